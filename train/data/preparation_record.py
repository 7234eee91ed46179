"""What a prepared volume says of its making, in an extension of its NIfTI header."""

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel


# How a NIfTI-1 file begins, in either order of bytes; others are not shown to nibabel, which would log what it repairs.
NIFTI_1 = tuple((348).to_bytes(4, order) for order in ("little", "big"))
COMMENT = 6  # NIfTI's code of an extension that is plain text
MADE_BY = "med3dvlm prepare"
# What is raised on a file that is damaged or of another kind. The last two are plain exceptions.
NOT_OURS = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.wrapstruct.WrapStructError,
)
# Options of the image processor for such volumes: cropped and scaled once, they are at most resized, for a model of another
# size than they were prepared for.
PREPARED: dict[str, Any] = {"intensity_mode": "none", "do_crop_foreground": False}


def prepared_options(prepared: bool) -> dict[str, Any]:
    """Options of the image processor for volumes that were prepared before, or none."""
    return dict(PREPARED) if prepared else {}


def read_preparation_record(path: str | Path) -> dict[str, Any] | None:
    """
    What a prepared volume says of its making: `settings` (a fingerprint), `source` (its state), `preprocessing_report` and
    `dropped` (names and reasons). Reads the header alone.

    Returns:
        `dict`, or None if there is no such file, or one that was written by something else or is damaged.
    """
    try:
        with Path(path).open("rb") as file:
            # By what it holds, not by its name: a volume that was unpacked, or renamed, is as prepared as before.
            is_compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if is_compressed else file
            if stream.read(4) not in NIFTI_1:
                return None
            stream.seek(0)
            header = nibabel.Nifti1Header.from_fileobj(stream)
        for extension in header.extensions:
            if extension.get_code() == COMMENT:
                content = extension.get_content()
                record = json.loads((content if isinstance(content, str) else content.decode()).rstrip("\0"))
                if isinstance(record, dict) and record.get("made_by") == MADE_BY:
                    return record
    except NOT_OURS:
        pass  # what is wrong with it, whoever opens it as a scan tells
    return None


def states_directions(path: str | Path, prepared: bool = False) -> bool:
    """
    Whether it is known of a volume where the patient's right and left are, so that a side may be named. Slices do not state it,
    and the affine of a volume that was prepared from slices only counts their pixels.

    Args:
        path (`str` or `Path`):
            The volume, a NIfTI file or a folder of slices.
        prepared (`bool`, *optional*, defaults to `False`):
            Whether volumes are prepared: then those without a record count as made of slices, as the original makes all of its.

    Returns:
        `bool`.
    """
    if Path(path).is_dir():
        return False
    record = read_preparation_record(path)
    return not prepared if record is None else not is_of_slices(record)


def is_of_slices(record: Mapping[str, Any]) -> bool:
    """Whether a prepared volume was made of slices, by its record."""
    return "source_entries" in record.get("source", {})


def check_not_prepared(path: str, options: Mapping[str, Any]) -> None:
    """
    Refuses to bring a prepared volume through the image processor as if it were a scan: cropped and scaled a second time, it
    would not be what training saw.

    Args:
        path (`str`):
            The volume.
        options (`Mapping`):
            Options of the image processor for it.

    Raises:
        ValueError: it was prepared, and the options would change its values.
    """
    if options.get("intensity_mode") != "none" and read_preparation_record(path) is not None:
        raise ValueError(
            f"{path}: written by `{MADE_BY}`, so it is cropped and scaled already, and must not be once more. Say so: "
            "data.volumes=prepared in a recipe, --prepared in an evaluation."
        )


__all__ = [
    "COMMENT",
    "MADE_BY",
    "PREPARED",
    "check_not_prepared",
    "is_of_slices",
    "prepared_options",
    "read_preparation_record",
    "states_directions",
]
