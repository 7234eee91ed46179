"""What published weights were trained with, in `training.json` beside them: settings, versions, and what came before."""

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any


TRAINING_NAME = "training.json"


def describe_training(settings: Mapping[str, Any], starts_from: Mapping[str, str | os.PathLike]) -> dict[str, Any]:
    """
    The record of a training.

    Args:
        settings (`Mapping`):
            All that the weights depend on, as JSON can hold it. Of absolute paths the last part is kept: a path tells about the
            machine.
        starts_from (`Mapping`):
            By name, the folders that the training started from; what is no folder counts as a repository on the Hub.

    Returns:
        `dict` with `tool`, the package and its version; `commit`, that of the checkout it ran from, with `-dirty` behind it
        where files were changed, or `None`; `settings`; and `before`, the records of those folders that have one.

    Raises:
        ValueError: the record in a folder is no JSON object.

    Example:

    ```python
    >>> describe_training({"stage": "projector", "data": {"root": "/data/phantoms"}}, {})["settings"]
    {'stage': 'projector', 'data': {'root': 'phantoms'}}
    ```"""
    before = {name: read_training_record(place) for name, place in starts_from.items()}
    return {
        "tool": f"med3dvlm {version('med3dvlm')}",
        "commit": find_commit(),
        "settings": without_absolute_paths(settings),
        "before": {name: record for name, record in before.items() if record is not None},
    }


def read_training_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    The record of a folder; `None` where there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    path = Path(folder) / TRAINING_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}. Copy the file again, or remove it.") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(record).__name__}. Copy the file again, or remove it."
        )
    return record


def find_commit() -> str | None:
    """The commit of the checkout that this package runs from; `None` where it is installed, or git does not tell."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}  # no other repository around it
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip() or None
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def without_absolute_paths(value: Any) -> Any:
    """
    A value of a JSON object in which the last part is kept of each path that leads out of a working directory: absolute ones,
    of Windows too, and those that begin with `~`, `..` or `file:`.
    """
    if isinstance(value, Mapping):
        return {name: without_absolute_paths(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_absolute_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    leads_out = value.startswith(("/", "~", "..", "file:")) or PureWindowsPath(value).is_absolute()
    return PureWindowsPath(value).name if leads_out else value


__all__ = ["TRAINING_NAME", "describe_training", "find_commit", "read_training_record", "without_absolute_paths"]
