"""What an evaluation has done so far, on disk, so that a call that was ended goes on where it was."""

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal:
    """
    Rows with an `id`, appended by any number of processes and starts, each to a file of its own.

    A row counts once its line is whole: whatever ends a process in the middle of one costs that row, and no other.

    Args:
        folder (`Path`):
            Of the files.
        name (`str`):
            What the rows are; several journals may lie in one folder.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp

    >>> journal = Journal(Path(mkdtemp()), "answers")
    >>> journal.append([{"id": "report/000000", "prediction": "A cyst."}])
    >>> journal.read()
    {'report/000000': {'id': 'report/000000', 'prediction': 'A cyst.'}}
    ```"""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.file = folder / f"{name}.{uuid.uuid4().hex}.jsonl"

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """
        Adds rows; they are on disk when this returns.

        Raises:
            ValueError: a number is NaN or infinite, which JSON does not have; no row is added.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as stream:
            stream.write(lines.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def read(self) -> dict[str, dict[str, Any]]:
        """
        All rows so far, by id.

        Raises:
            ValueError: a line that is whole is not one of ours.
        """
        rows: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line break was not finished
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    rows.setdefault(row["id"], row)
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{path}, line {number}: damaged ({error}). Delete this file; its rows are then made again."
                    ) from error
        return rows


__all__ = ["Journal"]
