"""Writing JSON that appears whole or not at all, what no file can hold, where settings differ, and keeping a folder to one process."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from transformers.utils import logging

from ..hub_cards.files import write_atomically, write_json_atomically


try:
    import fcntl
except ImportError:  # on Windows, where nothing then keeps two calls apart
    fcntl = None  # type: ignore[assignment]


logger = logging.get_logger(__name__)

# Locks that this process holds.
_held: set[IO[str]] = set()


def write_json_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """
    [`write_atomically`] for rows, one JSON object on each line, in UTF-8.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have: `None` stands for what is not known.
    """
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomically("".join(lines).encode(), path)


def without_nan(value: Any) -> Any:
    """A value that JSON is to hold, with `None` for each number in it that is NaN or infinite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Where two settings differ: the key, with dots between levels, and both values; None for one that is not there."""
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}", one, other


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Keys, with dots between levels, at which two settings differ."""
    return [key for key, _, _ in differences(first, second)]


def find_surrogate(text: str) -> str | None:
    """The first lone surrogate of a text, such as `"\\ud83d"`: JSON may spell it, and no file can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])[1:-1]
    return None


@contextmanager
def only_one_at(lock: Path, message: str) -> Iterator[None]:
    """
    Holds a lock on a file, which stays behind empty. The system frees it when this process ends, whatever ends it.

    Args:
        lock (`Path`):
            The file, in the folder that is kept to one; it is made if need be.
        message (`str`):
            Of the error.

    Raises:
        BlockingIOError: another process, or another part of this one, holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(message) from error
            except OSError as error:
                logger.warning(f"{lock.parent}: its disk has no locks ({error}); let no other call work on it.")
        _held.add(stream)
        try:
            yield
        finally:
            _held.discard(stream)


def _let_go_in_child() -> None:
    """A forked process, such as a worker of a data loader, has the lock too, and could outlive the one that it is of."""
    for stream in _held:
        stream.close()
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go_in_child)


__all__ = [
    "differences",
    "differing_keys",
    "find_surrogate",
    "only_one_at",
    "without_nan",
    "write_atomically",
    "write_json_atomically",
    "write_json_lines",
]
