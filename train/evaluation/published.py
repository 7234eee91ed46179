"""
Published figures with their sources, to stand beside what is measured here.

They lie in `published_results.json`. A figure is there only if a document that could be read states it, and its source names
that document. What the paper has and no such document was found for is listed as missing, so that a gap is not taken for a zero.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..data.samples import QUESTION_TYPES
from .scores import ALL_SAMPLES, MEAN_OF_TYPES


PUBLISHED_RESULTS = Path(__file__).with_name("published_results.json")
# What a table calls a figure by where it comes from.
PUBLISHED, MEASURED = "published", "measured here"

TEXT_METRICS = (
    "bleu_1",
    "corpus_bleu_4",
    "rouge_1",
    "rouge_l",
    "meteor",
    "bertscore",
    "exact",
    "ratescore",
    "green",
    "radgraph_f1",
)
# Figures of one task can only be of its own metrics.
METRICS_OF_TASK: dict[str, tuple[str, ...]] = {
    "report": TEXT_METRICS,
    "open_vqa": TEXT_METRICS,
    "closed_vqa": ("accuracy", "original_accuracy"),
    "yes_no_vqa": ("accuracy",),
    "retrieval": tuple(f"{name}_at_{rank}" for name in ("recall", "deduplicated_recall") for rank in (1, 5, 10)),
}
QUESTION_GROUPS = (*QUESTION_TYPES.values(), MEAN_OF_TYPES, ALL_SAMPLES)
# A source may give a recall without its direction.
ANY_DIRECTION = "direction not stated"
RETRIEVAL_GROUP = re.compile(rf"(volume to report|report to volume|{ANY_DIRECTION}), [1-9]\d*")


@dataclass(frozen=True)
class PublishedScore:
    """
    A figure that a document states.

    Args:
        table (`str`): Where in the document.
        task (`str`): A key of `METRICS_OF_TASK`.
        system (`str`): Whose figure it is.
        metric (`str`): As in [`Score`]. Accuracies of M3D and Med3DVLM are "original_accuracy", by the rule of their programs.
        group (`str`): As in [`Score`]: a type of question, "mean of types" or "all"; for retrieval such as
            "volume to report, 2000".
        value (`float`): In [0, 1].
        source (`str`): The document.
        note (`str`, *optional*): What the document leaves open.
    """

    table: str
    task: str
    system: str
    metric: str
    group: str
    value: float
    source: str
    note: str = ""


@dataclass(frozen=True)
class MissingResult:
    """
    Published figures that are not in the file.

    Args:
        table (`str`): Where they are published.
        about (`str`): What they are.
        tried (`str`): Where they were looked for.
    """

    table: str
    about: str
    tried: str


def read_published(path: str | Path | None = None) -> list[PublishedScore]:
    """
    Reads published figures.

    Args:
        path (`str` or `Path`, *optional*):
            A JSON file of your own; the one of the package by default. It holds `sources`, a text for each key, `scores`, the
            fields of [`PublishedScore`] with such a key as `source`, and, if need be, `missing`, those of [`MissingResult`].

    Returns:
        `list[PublishedScore]`, in the order of the file, with the text of the source.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has not this form: a field is unknown or absent, a value lies outside [0, 1], a source is not
            among the sources, or a figure occurs twice. The message names the place.

    Example:

    ```python
    >>> from med3dvlm.train.evaluation.published import read_published

    >>> [score.value for score in read_published() if (score.system, score.task) == ("Med3DVLM", "closed_vqa")]
    [0.7995]
    ```"""
    path, content = _read(path)
    sources = content["sources"]
    if not isinstance(sources, dict) or not all(isinstance(text, str) and text for text in sources.values()):
        raise ValueError(f"{path}: expected `sources` that give a text for each key.")
    scores = []
    seen: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(content["scores"], start=1):
        score = _read_score(f"{path}, score {number}", row, sources)
        key = (score.table, score.task, score.system, score.metric, score.group)
        if key in seen:
            raise ValueError(f"{path}, score {number}: the same figure as score {seen[key]} ({', '.join(key)}).")
        seen[key] = number
        scores.append(score)
    return scores


def read_missing(path: str | Path | None = None) -> list[MissingResult]:
    """
    Which published figures the file does not have.

    Args:
        path (`str` or `Path`, *optional*):
            As for [`read_published`].

    Returns:
        `list[MissingResult]`, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has not its form.
    """
    path, content = _read(path)
    missing = []
    for number, row in enumerate(content.get("missing", []), start=1):
        where = f"{path}, missing {number}"
        _check_fields(where, row, MissingResult, optional=())
        missing.append(MissingResult(**row))
    return missing


def list_sources(scores: Sequence[PublishedScore]) -> list[str]:
    """
    A line for each source of some figures, with what it leaves open, for below a table.

    Args:
        scores (`Sequence[PublishedScore]`):
            The figures that the table shows.

    Returns:
        `list[str]`.
    """
    lines: dict[str, list[str]] = {}
    for score in scores:
        notes = lines.setdefault(f"{score.table}: {score.source}.", [])
        if score.note and score.note not in notes:
            notes.append(score.note)
    return [" ".join([line, *notes]) for line, notes in lines.items()]


def _read(path: str | Path | None) -> tuple[Path, dict[str, Any]]:
    path = PUBLISHED_RESULTS if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of published results.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(content, dict) or not {"sources", "scores"} <= set(content) <= {"sources", "scores", "missing"}:
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected an object with 'sources', 'scores' and perhaps 'missing', got {found}.")
    for name in ("scores", "missing"):
        if not isinstance(content.get(name, []), list):
            raise ValueError(f"{path}: expected a list as {name!r}, got {type(content[name]).__name__}.")
    return path, content


def _read_score(where: str, row: Any, sources: dict[str, str]) -> PublishedScore:
    _check_fields(where, row, PublishedScore, optional=("note",))
    if row["source"] not in sources:
        raise ValueError(
            f"{where}: the source {row['source']!r} is not one of {', '.join(map(repr, sources)) or 'none'}."
        )
    if row["task"] not in METRICS_OF_TASK:
        raise ValueError(f"{where}: the task {row['task']!r} is not one of {', '.join(METRICS_OF_TASK)}.")
    if row["metric"] not in METRICS_OF_TASK[row["task"]]:
        known = ", ".join(METRICS_OF_TASK[row["task"]])
        raise ValueError(f"{where}: the metric {row['metric']!r} of {row['task']} is not one of {known}.")
    if row["task"] == "retrieval":
        if not RETRIEVAL_GROUP.fullmatch(row["group"]):
            raise ValueError(
                f"{where}: expected a group such as 'volume to report, 2000' or '{ANY_DIRECTION}, 2000', got {row['group']!r}."
            )
    elif row["group"] not in QUESTION_GROUPS:
        raise ValueError(f"{where}: the group {row['group']!r} is not one of {', '.join(QUESTION_GROUPS)}.")
    return PublishedScore(**{**row, "value": float(row["value"]), "source": sources[row["source"]]})


def _check_fields(where: str, row: Any, kind: type, optional: Sequence[str]) -> None:
    """Each field there, of its type and not empty, and no other."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}.")
    known = {field.name for field in fields(kind)}
    unknown, absent = sorted(set(row) - known), sorted(known - set(row) - set(optional))
    if unknown or absent:
        problems = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"absent: {', '.join(absent)}"] * bool(absent)
        raise ValueError(f"{where}: expected the fields {', '.join(sorted(known))}; {'; '.join(problems)}.")
    for name, value in row.items():
        if name == "value":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{where}: expected a value in [0, 1], got {value!r}. Divide percentages by 100.")
        elif not isinstance(value, str) or not (value or name in optional):
            raise ValueError(f"{where}: expected a text as {name!r}, got {value!r}.")


__all__ = [
    "ANY_DIRECTION",
    "MEASURED",
    "PUBLISHED",
    "PUBLISHED_RESULTS",
    "MissingResult",
    "PublishedScore",
    "list_sources",
    "read_missing",
    "read_published",
]
