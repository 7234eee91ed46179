"""The files of an evaluation: settings, scores, and what identifies a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers.utils import CONFIG_NAME, logging

from ...hub_cards.files import sha256_of
from ...hub_cards.publish import RECORDS, hashes_of_files
from ..checkpoints import done_by_first_process
from ..files import differing_keys, only_one_at, write_json_atomically, write_json_lines
from ..naming import name_a_few
from ..run_files import PUBLISHED, SKIPPED
from .predictions import read_json_lines
from .scores import Score


logger = logging.get_logger(__name__)

# What a repository must have here: configuration, weights, processor and tokenizer.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
JOURNAL = "journal"
# What calls the answers are of, see `calls.py`.
CALLS = "calls.json"
# Held by the call that works in a folder; it stays behind empty.
LOCK = ".evaluation.lock"
# What the commands write that have no scores in the form of the others.
ZERO_SHOT, DEPENDENCE = "zero_shot.json", "dependence.json"
RUN, REFERENCES, PREDICTIONS, SCORES, EMBEDDINGS = (
    "run.json",
    "references.jsonl",
    "predictions.jsonl",
    "scores.json",
    "embeddings.safetensors",
)


@contextmanager
def only_call_in(output: Path) -> Iterator[None]:
    """
    Keeps a second call away, which could mix the answers of another model with those that the first one makes. To be called in
    all processes; the first one holds the lock.

    Raises:
        BlockingIOError: in the first process, that another call is at work in the folder.
        ValueError: in the first process, the folder holds something else than an evaluation; in the others, either of the two.
    """
    message = f"{output}: another call is evaluating into this folder. Wait for it, or choose another folder."

    def take() -> None:
        check_is_evaluation(output)  # nothing is put into a folder of something else
        locks.enter_context(only_one_at(output / LOCK, message))

    with ExitStack() as locks:
        done_by_first_process(take)
        yield


def check_is_evaluation(output: Path) -> None:
    """
    Raises:
        ValueError: there is a folder that holds something else than an evaluation, or a file.
    """
    is_new = not output.exists() or (output.is_dir() and all(entry.name == LOCK for entry in output.iterdir()))
    if not is_new and not (output / RUN).is_file():
        raise ValueError(f"{output}: expected a new folder, or one of an evaluation; it holds something else.")


def open_folder(output: Path, settings: dict[str, Any]) -> None:
    """
    Begins an evaluation in a folder, or goes on with the one that is there. One in which nothing was answered yet, such as one
    with a wrong option that ended at once, is begun anew if need be. `run.json` also keeps the versions of the first call.

    Raises:
        ValueError: the folder holds something else.
    """
    check_is_evaluation(output)
    path = output / RUN
    settings, found = json.loads(json.dumps(settings)), versions()
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        before = begun.pop("versions", found)
        for name in RECORDS:  # earlier versions hashed them too
            ((begun.get("model") or {}).get("sha256") or {}).pop(name, None)
        keys = ", ".join(sorted(differing_keys(begun, settings)))
        if has_answers(output):
            if keys:
                raise ValueError(
                    f"{output}: holds an evaluation with other settings ({keys}). Choose another folder, or remove it."
                )
            if before != found:
                changed = ", ".join(sorted(differing_keys(before, found)))
                logger.warning(f"{output}: begun with other versions ({changed}), with which answers may be others.")
            return
        for name in (CALLS, REFERENCES, SKIPPED) if keys else ():
            (output / name).unlink(missing_ok=True)
    write_json_atomically({**settings, "versions": found}, path)


def has_answers(output: Path) -> bool:
    """Whether the folder of an evaluation holds answers, embeddings or scores, which are of its settings and data alone."""
    kept = [path for path in (output / JOURNAL).glob("[!.]*") if path.stat().st_size]
    return bool(kept) or any((output / name).exists() for name in (EMBEDDINGS, SCORES, ZERO_SHOT, DEPENDENCE))


def keep_references(output: Path, references: Sequence[dict[str, Any]]) -> None:
    """
    Writes what is asked into a folder that was begun, or checks that it is what was asked there before: answers are kept by id,
    and the id of a question says only which row of the data it is.

    Raises:
        ValueError: the data have changed since.
    """
    path = output / REFERENCES
    if not path.is_file() or not has_answers(output):
        write_json_lines(references, path)
        return
    begun = [row for _, row in read_json_lines(path)]
    changed = [(old, new) for old, new in zip(begun, references) if old != new]
    if len(begun) != len(references):
        problem = f"it asks for {len(begun)} questions and reports, the data have {len(references)} now"
    elif changed:
        old, new = changed[0]
        keys = ", ".join(sorted(differing_keys(old, new)))
        problem = f"{len(changed)} of its {len(begun)} questions and reports are others now, the first is {new['id']} ({keys})"
    else:
        return
    raise ValueError(
        f"{output}: the data have changed since this evaluation began: {problem}. Choose another folder, or restore the data."
    )


def snapshot_of(repository: str, revision: str | None = None) -> Path:
    """
    The files of a model on the Hub that an evaluation needs, downloaded unless they are there: the folder, whose name is the
    revision. Offline, what an earlier download left.

    Raises:
        OSError: there is no such repository, or, offline, no download of it.
    """
    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*"])
    )


def describe_source(name: str, snapshot: str | Path | None = None) -> dict[str, Any]:
    """
    What identifies a model or a file: its name, and the SHA-256 of its content; of a folder, those of its configuration and
    weights. What is neither is a repository on the Hub: its revision is named too.

    Args:
        name (`str`):
            Of the folder, file or repository.
        snapshot (`str` or `Path`, *optional*):
            Of a repository the files that are used, see [`snapshot_of`], which is called if they are not given.

    Raises:
        OSError: there is no such repository.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return {"name": path.name, "sha256": {path.name: sha256_of(path)}}
    if path.is_dir():
        # A stage calls its result `published`: what tells it from others is the folder above.
        place = path.absolute().parent if path.name == PUBLISHED else path
        return {"name": place.name, "sha256": hashes_of_files(path)}
    snapshot = Path(snapshot or snapshot_of(name))
    return {"name": name, "revision": snapshot.name, "sha256": hashes_of_files(snapshot)}


def check_scores_are_of(model: Path, folder: Path, scored: Mapping[str, Any], content: Mapping[str, str]) -> None:
    """
    Checks that the scores of an evaluation are those of a model, file by file.

    Args:
        model (`Path`):
            Folder of the model.
        folder (`Path`):
            Of the evaluation, for the message.
        scored (`Mapping`):
            What the evaluation says of its model, see [`describe_source`].
        content (`Mapping`):
            SHA-256 of the files in the model's folder now, by name.

    Raises:
        ValueError: they are of other files, of a repository whose files the evaluation does not know, or of answers or
            embeddings that a file gave.
    """
    again = f"Evaluate the folder (--model {model}), and give that evaluation."
    found = scored["sha256"]
    if not found:
        raise ValueError(
            f"{folder}: its scores are of the repository {scored['name']}, of whose files they say nothing, so that they may "
            f"be of other weights than those in {model}. {again}"
        )
    if CONFIG_NAME not in found:
        raise ValueError(
            f"{folder}: its scores are of the file {scored['name']}, not of the model in {model}. {again}"
        )
    # Where weights come from, and nothing that answers depend on.
    names = sorted({*found, *content} - set(RECORDS))
    differing = [name for name in names if found.get(name) != content.get(name)]
    if differing:
        raise ValueError(
            f"{folder}: its scores are of another model than the one in {model}: {name_a_few(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}. {again}"
        )


def read_scores(path: Path) -> list[Score]:
    """
    The scores of a `scores.json`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there are no scores. Run `med3dvlm evaluate` first.")
    rows = json.loads(path.read_text(encoding="utf-8"))["scores"]
    nan = float("nan")
    return [
        Score(
            **{
                **row,
                "low": nan if row["low"] is None else row["low"],
                "high": nan if row["high"] is None else row["high"],
            }
        )
        for row in rows
    ]


def versions_of_answers() -> dict[str, str]:
    """Of what answers depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "med3dvlm": version("med3dvlm")}


def versions() -> dict[str, str]:
    """Of what answers and their scores depend on."""
    return {
        **versions_of_answers(),
        **{name: version(name) for name in ("sacrebleu", "rouge-score", "nltk", "bert-score")},
    }


__all__ = [
    "CALLS",
    "DEPENDENCE",
    "EMBEDDINGS",
    "JOURNAL",
    "PREDICTIONS",
    "REFERENCES",
    "RUN",
    "SCORES",
    "ZERO_SHOT",
    "check_scores_are_of",
    "describe_source",
    "has_answers",
    "keep_references",
    "only_call_in",
    "open_folder",
    "read_scores",
    "snapshot_of",
    "versions",
    "versions_of_answers",
]
