"""Results of an evaluation in a model card: in its metadata, where the Hub reads them, and as a table for readers."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from .files import write_atomically


CARD_NAME, MODEL_INDEX, RESULTS = "README.md", "model-index", "Results"
FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---(?:\n|\Z)", re.DOTALL)
# Of a card's sections, those that results stand before.
SECTIONS_AFTER = (
    "Intended use",
    "Out of scope",
    "Limits",
    "For research only",
    "Training data and provenance",
    "Citation",
)
# Task on the Hub, and its name, by task of an evaluation.
HUB_TASKS = {
    "report": ("image-to-text", "Report generation"),
    "closed_vqa": ("visual-question-answering", "Closed questions"),
    "open_vqa": ("visual-question-answering", "Open questions"),
    "yes_no_vqa": ("visual-question-answering", "Yes/no questions"),
    "retrieval": ("image-text-retrieval", "Retrieval"),
}
# Identifier on the Hub by the start of a metric's name; others keep their own.
HUB_METRICS = {"bleu": "bleu", "corpus": "bleu", "rouge": "rouge", "exact": "exact_match"}
# Names for readers, of the metrics that have one of their own.
METRIC_TITLES = {
    "bleu_1": "BLEU-1",
    "corpus_bleu_4": "BLEU-4 of the corpus",
    "rouge_1": "ROUGE-1",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "bertscore": "BERTScore",
    "ratescore": "RaTEScore",
    "green": "GREEN",
    "radgraph_f1": "RadGraph F1",
    "exact": "Every word right",
}
# Names that cards have from earlier versions: a figure under one and under that of today are the same.
FORMER_TITLES = {"Exact match": METRIC_TITLES["exact"]}


def add_results_to_card(
    card_or_folder: str | os.PathLike,
    scores_json: str | os.PathLike | Mapping[str, Any],
    dataset_name: str,
    dataset_type: str,
    split: str = "test",
    model_name: str | None = None,
    groups: Sequence[str] | None = None,
) -> Path:
    """
    Puts the scores of an evaluation into a model card: into `model-index` of its metadata, and under "Results" as a table for
    each task. Doing it again replaces what was there for the same task, data set and split: the table, and in the metadata the
    same metrics; all else in the card stays as it is, to the byte.

    Scores of a part of the split are marked as such: by `args` of their data set in the metadata, and by the evaluation's notes
    above the table. They and those of the whole split, or of another part, replace each other.

    Args:
        card_or_folder (`str` or `os.PathLike`):
            A card, or the folder of a published model or adapter with its `README.md`.
        scores_json (`str`, `os.PathLike` or `Mapping`):
            The `scores.json` of an evaluation, or its content: under `scores` a list of figures with `task`, `metric`, `group`,
            `value` in [0, 1], `low`, `high`, `count`, `blind` and `chance`. `notes` are texts for readers; `part_of_split` says
            whether only the first `num_cases` cases of the split were scored.
        dataset_name (`str`):
            For readers, such as "M3D-VQA".
        dataset_type (`str`):
            For the Hub: a data set's `organisation/name`, or a word for what is not there.
        split (`str`, *optional*, defaults to `"test"`):
            Of the data set.
        model_name (`str`, *optional*):
            Name in `model-index`; by default the one that is there, or the card's heading.
        groups (`Sequence[str]`, *optional*):
            Groups that go into the metadata, such as "mean of types" and "all"; all by default. The tables have all of them.

    Returns:
        `Path`: the card.

    Raises:
        FileNotFoundError: there is no card, or no file of scores.
        ValueError: the card's metadata or markers are not as they must be, the scores are not of this form, a value is not
            finite, no score is of `groups`, or the name of the data set or split cannot stand in a card.

    Example:

    ```python
    >>> from med3dvlm.hub_cards.model_index import add_results_to_card

    >>> add_results_to_card("published", "evaluation/scores.json", "M3D-VQA", "org/M3D-VQA")  # doctest: +SKIP
    ```"""
    _check_names(dataset_name, dataset_type, split)
    path = Path(card_or_folder)
    path = path / CARD_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such card. Pass a card, or the folder of a published model.")
    scores, notes, dataset_args = _read_scores(scores_json)
    content = path.read_bytes().decode("utf-8")
    has_crlf = "\r\n" in content and content.count("\r\n") == content.count("\n")
    text = content.replace("\r\n", "\n") if has_crlf else content
    match = FRONT_MATTER.match(text)
    if match is None:
        raise ValueError(
            f"{path}: expected metadata between two lines `---` at its beginning, as a model card has them."
        )
    metadata, body = match[1], text[match.end() :]
    chosen = [score for score in scores if groups is None or score["group"] in groups]
    if not chosen:
        known = ", ".join(dict.fromkeys(score["group"] for score in scores))
        raise ValueError(f"No score is of the groups {', '.join(groups or ())}: expected some of {known}.")
    results = [_to_eval_result(score, dataset_name, dataset_type, split, dataset_args) for score in chosen]
    before = _load_metadata(metadata, path)
    old_index = before.get(MODEL_INDEX) or []
    name = model_name or (old_index[0]["name"] if old_index else _heading(body)) or path.absolute().parent.name
    new_index = _merge(old_index, eval_results_to_model_index(name, results)[0])
    new_metadata = _replace_key(metadata, new_index)
    if _load_metadata(new_metadata, path) != {**before, MODEL_INDEX: new_index}:
        raise ValueError(
            f"{path}: `{MODEL_INDEX}` cannot be replaced without touching other metadata. Write the metadata in block style, "
            "one key on a line."
        )
    new_body = body
    for task in dict.fromkeys(score["task"] for score in scores):
        table = _format_results(task, scores, notes, dataset_name, split)
        new_body = _replace_section(new_body, table, _markers(task, dataset_type, split), path)
    new_text = f"---\n{new_metadata}{text[match.end(1) : match.end()]}{new_body}"
    write_atomically((new_text.replace("\n", "\r\n") if has_crlf else new_text).encode(), path)
    return path


def read_card(path: Path) -> tuple[dict[str, Any], str] | None:
    """
    Reads a model card.

    Args:
        path (`Path`):
            The file.

    Returns:
        The metadata and the text after them; `None` where there is no file, or one that has no metadata.

    Raises:
        ValueError: what stands where metadata stand cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    match = FRONT_MATTER.match(text)
    return None if match is None else (_load_metadata(match[1], path), text[match.end() :])


def section_of(body: str, heading: str, following: str | None = None) -> str:
    """
    A section of a card's text: its heading `## ...` and what stands under it, without white space at the ends.

    Args:
        body (`str`):
            The text after the metadata.
        heading (`str`):
            Of the section.
        following (`str`, *optional*):
            Heading that ends it, whatever others stand before; the next one by default.

    Returns:
        `str`: empty where there is no such section.
    """
    headings = _headings(body)
    here = next((number for number, (_, title) in enumerate(headings) if title == heading), None)
    if here is None:
        return ""
    ends = [place for place, title in headings[here + 1 :] if following in (None, title)]
    return body[headings[here][0] : ends[0] if ends else len(body)].strip()


def carry_over(card: Path, metadata: Mapping[str, Any], results: str) -> None:
    """
    Puts into a new card what an older one of the same weights says.

    Args:
        card (`Path`):
            The new card, which has no results yet.
        metadata (`Mapping`):
            Metadata of the old one; keys that the new one has stay as they are there.
        results (`str`):
            Its section "Results", see [`section_of`]; may be empty.
    """
    text = card.read_text(encoding="utf-8")
    match = FRONT_MATTER.match(text)
    assert match is not None  # it was made here
    known = _load_metadata(match[1], card)
    added = {name: value for name, value in metadata.items() if name not in known}
    body = text[match.end() :]
    new_body = _insert(body, _place_of_results(body), results) if results else body
    write_atomically(f"---\n{match[1]}{_to_yaml(added) if added else ''}---\n{new_body}".encode(), card)


def hub_metric(metric: str) -> str:
    """
    A metric's identifier on the Hub.

    Example:

    ```python
    >>> from med3dvlm.hub_cards.model_index import hub_metric

    >>> hub_metric("bleu_1"), hub_metric("recall_at_5"), hub_metric("original_accuracy")
    ('bleu', 'recall@5', 'accuracy')
    ```"""
    if match := re.search(r"(?:^|_)recall_at_(\d+)$", metric):
        return f"recall@{match[1]}"
    if metric == "accuracy" or metric.endswith("_accuracy"):
        return "accuracy"
    return HUB_METRICS.get(metric.partition("_")[0], metric)


def readable_metric(metric: str) -> str:
    """
    A metric's name for readers.

    Example:

    ```python
    >>> from med3dvlm.hub_cards.model_index import readable_metric

    >>> readable_metric("bleu_1"), readable_metric("deduplicated_recall_at_5"), readable_metric("original_accuracy")
    ('BLEU-1', 'Deduplicated recall@5', 'Original accuracy')
    ```"""
    if metric in METRIC_TITLES:
        return METRIC_TITLES[metric]
    words = metric.replace("_at_", "@").replace("_", " ")
    return words[:1].upper() + words[1:]


def _check_names(dataset_name: str, dataset_type: str, split: str) -> None:
    # They stand in headings, in YAML and in HTML comments.
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset_type) or "--" in dataset_type:
        raise ValueError(f"Expected `dataset_type` to be `organisation/name` or a word, got {dataset_type!r}.")
    if not re.fullmatch(r"[\w.-]+", split) or "--" in split:
        raise ValueError(f"Expected `split` to be a word such as 'test', got {split!r}.")
    if not dataset_name.strip() or not dataset_name.isprintable() or re.search(r"[<>|]", dataset_name):
        raise ValueError(
            f"Expected `dataset_name` to be one line of plain text without <, > and |, got {dataset_name!r}."
        )


def _read_scores(
    source: str | os.PathLike | Mapping[str, Any],
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any] | None]:
    """Figures, notes, and `args` of the data set: the number of cases where they are a part of the split."""
    if isinstance(source, Mapping):
        name, content = "The scores", source
    else:
        path = Path(source)
        name = str(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there are no scores. Run `med3dvlm evaluate` first.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}).") from error
    rows = content.get("scores") if isinstance(content, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{name}: expected a list of at least one figure under `scores`. Run `med3dvlm evaluate` anew."
        )
    seen = set()
    for number, row in enumerate(rows, start=1):
        texts = [row.get(key) for key in ("task", "metric", "group")] if isinstance(row, Mapping) else [None]
        if not all(isinstance(text, str) and text for text in texts) or not isinstance(row.get("count"), int):
            raise ValueError(
                f"{name}, figure {number}: expected `task`, `metric`, `group` and `count`, got {str(row)[:120]}."
            )
        if not re.fullmatch(r"[\w.-]+", row["task"]) or "--" in row["task"]:  # it stands in an HTML comment
            raise ValueError(f"{name}, figure {number}: expected `task` to be a word, got {row['task']!r}.")
        if not isinstance(row.get("value"), (int, float)) or not math.isfinite(row["value"]):
            raise ValueError(f"{name}, figure {number}: expected a finite `value`, got {row.get('value')}.")
        if tuple(texts) in seen:
            raise ValueError(f"{name}, figure {number}: {' / '.join(map(str, texts))} occurs a second time.")
        seen.add(tuple(texts))
    notes = content.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"{name}: expected a list of texts under `notes`, got {str(notes)[:120]!r}.")
    args = None
    if content.get("part_of_split"):
        if not isinstance(content.get("num_cases"), int):
            raise ValueError(
                f"{name}: expected the number of cases under `num_cases`, got {content.get('num_cases')}."
            )
        args = {"num_cases": content["num_cases"]}
    return [dict(row) for row in rows], notes, args


def _to_eval_result(
    score: Mapping[str, Any], dataset_name: str, dataset_type: str, split: str, dataset_args: dict[str, Any] | None
) -> EvalResult:
    task_type, task_name = HUB_TASKS.get(score["task"], (score["task"].replace("_", "-"), score["task"]))
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        # Without it, huggingface_hub would put closed and open questions into one entry, under the name of one of them.
        dataset_config=score["task"],
        dataset_split=split,
        dataset_args=dataset_args,
        metric_type=hub_metric(score["metric"]),
        metric_name=f"{readable_metric(score['metric'])} ({score['group']})",
        metric_value=round(float(score["value"]), 4),
    )


def _load_metadata(metadata: str, path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(metadata)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: its metadata are no YAML ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected metadata with keys, got {str(content)[:80]!r}.")
    if content.get(MODEL_INDEX):
        try:
            model_index_to_eval_results(content[MODEL_INDEX])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: its `{MODEL_INDEX}` is not of the Hub's form ({error!r}). Correct or remove it."
            ) from error
    return content


def _merge(index: Sequence[Mapping[str, Any]], element: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models of an index, with the results of one put in: in the place of its own earlier ones, else at the end."""
    models = [{**model, "results": list(model["results"])} for model in index]
    own = next((model for model in models if model["name"] == element["name"]), None)
    if own is None:
        return [*models, dict(element)]
    places = {_result_key(result): place for place, result in enumerate(own["results"])}
    for result in element["results"]:
        place = places.get(_result_key(result))
        if place is None:
            own["results"].append(result)
            continue
        old = own["results"][place]
        # Figures of other cases would stand there as of these.
        kept = old["metrics"] if old["dataset"].get("args") == result["dataset"].get("args") else []
        metrics = {_metric_key(metric): metric for metric in (*kept, *result["metrics"])}
        own["results"][place] = {**old, **result, "metrics": list(metrics.values())}
    return models


def _result_key(result: Mapping[str, Any]) -> str:
    """
    Equal for results that belong into one entry, on whatever number of cases; those with a source are another's, and stay by
    themselves.
    """
    data = result["dataset"]
    args = data.get("args")
    if isinstance(args, dict):
        args = {name: value for name, value in args.items() if name != "num_cases"} or None
    return json.dumps(
        [result["task"]["type"], data["type"]]
        + [data.get(name) for name in ("config", "split", "revision")]
        + [args, result.get("source")],
        sort_keys=True,
        default=str,
    )


def _metric_key(metric: Mapping[str, Any]) -> str:
    title, bracket, group = str(metric.get("name")).partition(" (")
    name = FORMER_TITLES.get(title, title) + bracket + group
    return json.dumps([name, *(metric.get(key) for key in ("type", "config", "args", "verified"))], default=str)


def _replace_key(metadata: str, new_index: list[dict[str, Any]]) -> str:
    """Replaces the lines of `model-index`, or adds them at the end; all other lines stay as they are."""
    block = _to_yaml({MODEL_INDEX: new_index})
    lines = metadata.splitlines(keepends=True)
    start = next((place for place, line in enumerate(lines) if re.match(rf"{MODEL_INDEX}\s*:", line)), None)
    if start is None:
        return metadata + block
    end = start + 1
    while end < len(lines) and re.match(
        r"[ \t-]", lines[end]
    ):  # what belongs to a key is indented, or an entry of a list
        end += 1
    return "".join([*lines[:start], block, *lines[end:]])


def _to_yaml(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=math.inf)


def _heading(body: str) -> str | None:
    return next((line[2:].strip() for _, line in _lines_outside_code(body) if line.startswith("# ")), None)


def _headings(body: str) -> list[tuple[int, str]]:
    """The headings `## ...` of a card, each with the place where it begins."""
    return [(place, line[3:].strip()) for place, line in _lines_outside_code(body) if line.startswith("## ")]


def _place_of_results(body: str) -> int:
    """Where the section of results begins in a card that has none."""
    return next((place for place, heading in _headings(body) if heading in SECTIONS_AFTER), len(body))


def _insert(body: str, place: int, block: str) -> str:
    """A text with a block put in at a place, between empty lines."""
    before, after = body[:place], body[place:]
    gap = "" if before.endswith("\n\n") or not before else "\n" if before.endswith("\n") else "\n\n"
    return f"{before}{gap}{block}\n" + (f"\n{after}" if after else "")


def _lines_outside_code(text: str) -> list[tuple[int, str]]:
    """Lines with the place where they begin, without those of code between fences."""
    lines, place, in_code = [], 0, False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            lines.append((place, line))
        place += len(line)
    return lines


def _markers(task: str, dataset_type: str, split: str) -> tuple[str, str]:
    where = f"results of {task} on {dataset_type}, {split}"
    return f"<!-- {where}: begin -->", f"<!-- {where}: end -->"


def _replace_section(body: str, results: str, markers: tuple[str, str], path: Path) -> str:
    """Puts results between their markers; where there are none yet, at the end of "Results", which is made if need be."""
    begin, end = markers
    block = f"{begin}\n{results}\n{end}"
    if begin in body or end in body:
        if body.count(begin) != 1 or body.count(end) != 1 or body.index(begin) > body.index(end):
            raise ValueError(
                f"{path}: expected `{begin}` and after it `{end}`, each once. Remove them, and try again."
            )
        return body[: body.index(begin)] + block + body[body.index(end) + len(end) :]
    headings = _headings(body)
    here = next((number for number, (_, heading) in enumerate(headings) if heading == RESULTS), None)
    if here is None:
        return _insert(body, _place_of_results(body), f"## {RESULTS}\n\n{block}")
    return _insert(body, headings[here + 1][0] if here + 1 < len(headings) else len(body), block)


def _format_results(
    task: str, scores: Sequence[Mapping[str, Any]], notes: Sequence[str], dataset_name: str, split: str
) -> str:
    lines = [f"### {dataset_name}, {split}: {HUB_TASKS.get(task, (task, task))[1].lower()}", ""]
    for note in notes:
        lines += [f"**{_cell(note)}**", ""]
    lines += [
        "In percent, with the 95 % interval. Blind: answered with the volume of another case. Chance: what guessing gives, for texts the true answer of another case.",
        "",
    ]
    head = ("Metric", "Group", "Model", "95 % interval", "Blind", "Chance", "Samples")
    lines += [f"| {' | '.join(head)} |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for score in scores:
        if score["task"] == task:
            low, high = _percent(score.get("low")), _percent(score.get("high"))
            cells = [
                _cell(readable_metric(score["metric"])),
                _cell(score["group"]),
                _percent(score["value"]),
                f"{low} to {high}" if low and high else "",
                _percent(score.get("blind")),
                _percent(score.get("chance")),
                f"{score['count']:,}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _cell(text: str) -> str:
    """A text that cannot end a cell of a table, its row, or the comment around it."""
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())


__all__ = ["add_results_to_card", "carry_over", "hub_metric", "read_card", "readable_metric", "section_of"]
