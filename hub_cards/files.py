"""Writing files that appear whole or not at all, and telling them apart."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(content: bytes, path: Path) -> None:
    """
    Writes a file that appears whole or not at all, whatever interrupts, under a name that no other process uses in the
    meantime. Its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json_atomically(content: Mapping[str, Any], path: Path) -> None:
    """[`write_atomically`] for what JSON can hold."""
    write_atomically(json.dumps(content, indent=1).encode(), path)


def sha256_of(path: Path) -> str:
    """Of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


__all__ = ["sha256_of", "write_atomically", "write_json_atomically"]
