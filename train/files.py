"""Writing JSON that appears whole or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..hub_cards.files import write_atomically, write_json_atomically


def write_json_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """[`write_atomically`] for rows, one JSON object on each line, in UTF-8."""
    write_atomically("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), path)


__all__ = ["write_atomically", "write_json_atomically", "write_json_lines"]
