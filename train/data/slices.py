"""Raw case folders of M3D-Cap: series as folders of picture files, one a slice, and the report as a text file."""

import re
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from transformers.utils import logging

from ...processing.volume_io import MAX_VOXELS, InvalidVolumeError, Volume
from ..naming import name_a_few


logger = logging.get_logger(__name__)

# The original takes these endings, in small letters, and leaves out all others, `.jpg` too.
SLICE_ENDINGS = (".png", ".jpeg")
NIFTI_ENDINGS = (".nii.gz", ".nii")
# What to do with `.jpg` slices, which messages end with.
JPG_REMEDY = "rename to .jpeg, or prepare with --accept-jpg (in Python `accept_jpg=True`)"
# How the reason begins for a file that would be a slice, but is damaged, has its ending in capitals, or a number that
# Python takes for one and slices do not have.
DAMAGED = "the picture cannot be read"
MISNAMED, MISNUMBERED = "its ending is not in small letters", "its number is not in plain digits"
# Place of the byte in a PNG file that tells the bits of a channel: after signature, length, name, width and height.
PNG_BIT_DEPTH = 24
# A report that keeps fewer characters than this after a heading was not written under that heading.
MIN_REPORT_CHARACTERS = 5
# Letters that do not come apart into an ASCII letter and an accent, and signs that stand in names of series.
ASCII_OF = {
    "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ð": "d",
    "Ð": "D", "þ": "th", "Þ": "Th", "ł": "l", "Ł": "L", "ħ": "h", "Ħ": "H", "ı": "i", "‐": "-", "‑": "-", "‒": "-",  # noqa: RUF001
    "–": "-", "—": "--", "−": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "×": "x", "°": "deg", "µ": "u",  # noqa: RUF001
}  # fmt: skip

# The name of a file in the folder of a series, and why no slice was made of it.
DroppedSlice = tuple[str, str]


def is_slice_folder(path: Path, accept_jpg: bool = False) -> bool:
    """Whether `path` is a folder that holds slices, as [`read_slices`] takes them."""
    return path.is_dir() and any(entry.name.endswith(_endings(accept_jpg)) for entry in visible_entries(path))


def find_cases(source: Path, accept_jpg: bool = False) -> list[str]:
    """
    The case folders below `source`, sorted, relative to it: folders with a text file, a NIfTI file or folders of slices; and
    folders with no folder in them, in which nothing is found later. A text above whole cases makes no case of their
    folder; where it could be their report as well, [`describe_rival_texts`] says so.
    """
    cases: list[str] = []
    waiting = [path for path in reversed(visible_entries(source)) if path.is_dir()]
    seen = {source.resolve()}
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in seen:  # a link to a folder that was looked at, perhaps one above it
            continue
        seen.add(folder.resolve())
        entries = visible_entries(folder)
        folders = [path for path in entries if path.is_dir()]
        is_case = any(is_nifti_file(path) for path in entries) or not folders
        is_case = is_case or any(is_slice_folder(path, accept_jpg) for path in folders)
        if is_case or (_texts(folder) and not _is_above_cases(folder, accept_jpg)):
            cases.append(folder.relative_to(source).as_posix())
        else:
            waiting += reversed(folders)
    return cases


def find_rival_texts(source: Path, cases: Sequence[str], accept_jpg: bool = False) -> dict[str, str]:
    """
    For each case whose report is in doubt, what [`describe_rival_texts`] says of it. A folder above cases is listed once for all
    of them: M3D has some 30,000 in one.
    """
    above = {folder for folder in {PurePosixPath(case).parent.as_posix() for case in cases} if _texts(source / folder)}
    found = {
        case: describe_rival_texts(source, case, accept_jpg)
        for case in cases
        if PurePosixPath(case).parent.as_posix() in above
    }
    return {case: reason for case, reason in found.items() if reason}


def describe_rival_texts(source: Path, case: str, accept_jpg: bool = False) -> str:
    """
    What is wrong with a case whose report may be its own text or one in the folder above, and what to do.

    With `P1/report.txt`, `P1/nifti/scan.nii.gz` and `P1/nifti/log.txt`, the case may be `P1`, or `P1/nifti` below a text
    that is the report of none: [`find_cases`] finds `P1/nifti`, and which text describes the scan only its owner knows.
    Folders of slices in the case leave no doubt, as they are no series of the folder above.

    Args:
        source (`Path`), case (`str`):
            As [`find_cases`] has them.
        accept_jpg (`bool`, *optional*, defaults to `False`):
            Whether a folder with nothing but `.jpg` files holds slices too.

    Returns:
        `str`, without a full stop, which names the texts relative to `source`; empty where there is no doubt.
    """
    folder = source / case
    own, above = _texts(folder), _texts(folder.parent) if folder.parent != source else []
    if not own or not above:
        return ""
    entries = visible_entries(folder)
    if not any(map(is_nifti_file, entries)) or any(is_slice_folder(path, accept_jpg) for path in entries):
        return ""
    names = [path.relative_to(source).as_posix() for path in (*above, *own)]
    return f"{len(names)} texts could be the report of these scans: keep one of {', '.join(names)}"


def _texts(folder: Path) -> list[Path]:
    return [path for path in visible_entries(folder) if path.name.endswith(".txt") and path.is_file()]


def _is_above_cases(folder: Path, accept_jpg: bool) -> bool:
    """Whether a folder has no series of its own, and a whole case, with text and series, lies below it."""
    waiting = [path for path in visible_entries(folder) if path.is_dir()]
    # Its own scans may lie one folder deeper; with a text beside them, they are those of a case.
    if any(is_nifti_file(file) for path in waiting if not _texts(path) for file in visible_entries(path)):
        return False
    seen = {folder.resolve()}
    while waiting:
        path = waiting.pop()
        if path.resolve() in seen:  # a link to a folder that was looked at
            continue
        seen.add(path.resolve())
        if _texts(path) and find_series(path, accept_jpg):
            return True
        waiting += [entry for entry in visible_entries(path) if entry.is_dir()]
    return False


def find_series(case_folder: str | Path, accept_jpg: bool = False) -> list[Path]:
    """
    The series of a case, sorted by path.

    Args:
        case_folder (`str` or `Path`):
            Folder of the case.
        accept_jpg (`bool`, *optional*, defaults to `False`):
            Whether a folder with nothing but `.jpg` files is a series too.

    Returns:
        `list[Path]`: folders of slices; and NIfTI files, which lie in the case folder or in a folder below it. Folders
        with neither are no series.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    case_folder = Path(case_folder)
    if not case_folder.is_dir():
        raise FileNotFoundError(f"{case_folder}: there is no such folder. Expected the folder of a case.")
    series = []
    for entry in visible_entries(case_folder):
        if entry.is_dir():
            if is_slice_folder(entry, accept_jpg):
                series.append(entry)
            series += [path for path in visible_entries(entry) if is_nifti_file(path)]
        elif is_nifti_file(entry):
            series.append(entry)
    return series


def folders_without_series(case_folder: Path, series: Sequence[Path]) -> list[Path]:
    """The folders in that of a case, sorted, which neither are one of its `series` nor hold one."""
    used = {*series, *(path.parent for path in series)}
    return [path for path in visible_entries(case_folder) if path.is_dir() and path not in used]


def read_slices(folder: str | Path, accept_jpg: bool = False) -> tuple[np.ndarray, list[DroppedSlice]]:
    """
    Stacks the slices of a series as the M3D-Cap preparation does.

    Files ending in `.png` or `.jpeg`, in the order of the whole numbers that are their names, become 8-bit grey values
    (luma of Rec. 601; transparency is ignored) over 255. Slices of the most frequent shape are kept; of two shapes that
    are as frequent, the one that comes first.

    Args:
        folder (`str` or `Path`):
            Folder of the series.
        accept_jpg (`bool`, *optional*, defaults to `False`):
            Whether to take `.jpg` files too, which the original leaves out.

    Returns:
        `np.ndarray` of shape `(depth, height, width)`, float32 in [0, 1]; and a `list[tuple[str, str]]` of every other
        entry of the folder by name, each with the reason why no slice was made of it: another kind of file, a name that
        is no number, a damaged or misnamed file (see [`damaged_slices`]), more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`, more than 8 bits a channel, another shape.

    Raises:
        FileNotFoundError: there is no such folder.
        InvalidVolumeError: no slice is left or a single one, or there are too many pixels in all.

    Example:

    ```python
    >>> array, dropped = read_slices("000006/Axial_non_contrast")  # doctest: +SKIP
    >>> array.shape, dropped  # doctest: +SKIP
    ((61, 512, 512), [('23.png', 'the picture cannot be read: image file is truncated')])
    ```"""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder. Expected one of slices, .png or .jpeg.")
    numbered, dropped = _sort_by_number(folder, accept_jpg)
    names, pictures, num_pixels = [], [], 0
    for path in numbered:
        try:
            picture = read_picture(path)
        except ValueError as error:
            dropped.append((path.name, str(error)))
            continue
        num_pixels += picture.size
        if num_pixels > MAX_VOXELS:
            raise InvalidVolumeError(
                f"{folder}: the slices have more than {MAX_VOXELS} pixels in all, which no scan has. Split the folder "
                "into its series."
            )
        names.append(path.name)
        pictures.append(picture)
    if not pictures:
        reasons = show_dropped(dropped) or "the folder is empty"
        raise InvalidVolumeError(
            f"{folder}: expected slices named by whole numbers, such as 12.png, got none that can be used ({reasons})."
        )
    shapes = Counter(picture.shape for picture in pictures)
    shape = max(shapes, key=lambda shape: shapes[shape])  # the first of equals: a Counter keeps the order
    for name, picture in zip(names, pictures):
        if picture.shape != shape:
            dropped.append((name, f"{_size(picture.shape)} pixels, most slices have {_size(shape)}"))
    stack = np.stack([picture for picture in pictures if picture.shape == shape])
    if len(stack) == 1:
        raise InvalidVolumeError(
            f"{folder}: expected the slices of a volume, got a single one of {_size(shape)} pixels"
            f"{f', and {len(dropped)} other files' if dropped else ''}. Collect the slices of the series in one folder."
        )
    return stack.astype(np.float32) / 255, dropped


def damaged_slices(dropped: Sequence[DroppedSlice]) -> list[DroppedSlice]:
    """Among what [`read_slices`] left out, the files that would be slices, see [`is_damage`]: the volume has gaps there."""
    return [(name, reason) for name, reason in dropped if is_damage(reason)]


def is_damage(reason: str) -> bool:
    """Whether the reason why a file is no slice is that it is damaged or misnamed."""
    return reason.startswith(DAMAGED) or is_misnaming(reason)


def is_misnaming(reason: str) -> bool:
    """Whether the reason why a file is no slice is one of [`describe_misnaming`]."""
    return reason.startswith((MISNAMED, MISNUMBERED))


def open_scan(path: str) -> tuple[str | Volume, list[DroppedSlice]]:
    """
    What the image processor takes for the scan at a path: of a folder of slices their stack, else the path itself.

    Returns:
        `str` or [`Volume`]; and what was left out of a stack, see [`read_slices`], which a warning names too.

    Raises:
        InvalidVolumeError: no stack can be made of the slices, or some are damaged or misnamed.
    """
    if not is_slice_folder(Path(path)):
        refuse_other_pictures(Path(path))
        return path, []
    stack, dropped = read_slices(path)
    repeated, missing = repeated_numbers(Path(path), dropped), missing_numbers(Path(path))
    if repeated:
        logger.warning(f"{path}: {describe_repeated(repeated)}.")
    if missing:
        logger.warning(f"{path}: {describe_missing(missing)}.")
    damaged = damaged_slices(dropped)
    if damaged:
        raise InvalidVolumeError(f"{path}: {describe_damaged(len(stack), damaged)}")
    if dropped:
        logger.warning(f"{path}: {len(dropped)} files are not among the slices ({show_dropped(dropped)}).")
    return Volume(path, stack, stack.shape, stack.dtype), dropped  # so that messages name the folder


def repeated_numbers(folder: Path, dropped: Sequence[DroppedSlice]) -> list[str]:
    """
    Names of the slices of a stack whose number another one has too, as 1.png and 1.jpeg. In the stack is all that
    [`read_slices`] has not `dropped`.
    """
    left_out = {name for name, _ in dropped}
    stacked = sorted(
        (number, path.name)
        for path in folder.iterdir()
        if path.name not in left_out and (number := slice_number(path)) is not None
    )
    counts = Counter(number for number, _ in stacked)
    return [name for number, name in stacked if counts[number] > 1]


def describe_repeated(names: Sequence[str]) -> str:
    """What is wrong with the numbers of these slices, and what to do."""
    return (
        f"{len(names)} slices share their number with another one ({name_a_few(names, 4)}), and all are in the stack: keep one of "
        "each"
    )


def missing_numbers(folder: Path) -> list[tuple[int, int]]:
    """
    Where the numbers of the slices in a folder have a gap: the numbers before and after it. A slice that is there but was left
    out of the stack is no gap, and neither are steps that are all of one length.
    """
    endings = _endings(accept_jpg=True)
    found = {slice_number(path) for path in folder.iterdir() if path.name.lower().endswith(endings)}
    pairs = list(pairwise(sorted(number for number in found if number is not None)))
    if len({after - before for before, after in pairs}) < 2:
        return []
    return [(before, after) for before, after in pairs if after > before + 1]


def describe_missing(gaps: Sequence[tuple[int, int]]) -> str:
    """What is wrong with the numbers of slices that have these gaps, see [`missing_numbers`], and what to do."""
    count = sum(after - before - 1 for before, after in gaps)
    named = [f"{before + 1}" if after == before + 2 else f"{before + 1} to {after - 1}" for before, after in gaps]
    return (
        f"{count} numbers between the first slice and the last are missing ({name_a_few(named, 4)}): see whether all slices were "
        "copied"
    )


def describe_damaged(num_slices: int, damaged: Sequence[DroppedSlice]) -> str:
    """What is wrong with a stack of `num_slices` slices that lacks the damaged and misnamed ones, and what to do."""
    is_misnamed = any(is_misnaming(reason) for _, reason in damaged)
    what, remedy = ("damaged or misnamed", "Mend") if is_misnamed else ("damaged", "Copy or download")
    return (
        f"{len(damaged)} slices are {what}, beside {num_slices} that can be read ({show_dropped(damaged)}). {remedy} them"
        f"{'' if is_misnamed else ' again'}; to do without them, delete them."
    )


def show_dropped(dropped: Sequence[DroppedSlice]) -> str:
    """The first few files that were left out, with the reasons."""
    return name_a_few([f"{name}: {reason}" for name, reason in dropped], 3, "; ")


def refuse_other_pictures(path: Path) -> None:
    """
    Raises:
        InvalidVolumeError: `path` is a folder of pictures whose names end otherwise than those of slices.
    """
    if not path.is_dir():
        return
    endings = {entry.suffix for entry in visible_entries(path) if slice_number(entry) is not None}
    found = sorted(ending for ending in endings if ending.lower() in (*SLICE_ENDINGS, ".jpg"))
    if found:
        raise InvalidVolumeError(
            f"{path}: expected a NIfTI file or a folder of slices, .png or .jpeg, got a folder of {', '.join(found)} files: "
            f"{remedy_for_endings(found)}."
        )


def remedy_for_endings(endings: Collection[str]) -> str:
    """What to do with files of these endings that would be slices under others; empty where none of them would."""
    if ".jpg" in endings:
        return JPG_REMEDY
    would_be_slices = any(ending.lower() in (*SLICE_ENDINGS, ".jpg") for ending in endings)
    return "rename them to .png or .jpeg, in small letters" if would_be_slices else ""


def read_picture(path: Path) -> np.ndarray:
    """
    One slice as 8-bit grey values.

    Returns:
        `np.ndarray` of shape `(height, width)`, uint8.

    Raises:
        ValueError: why it cannot be used.
    """
    try:
        with path.open("rb") as file:
            header = file.read(PNG_BIT_DEPTH + 1)
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            # Pillow itself warns here, and refuses from twice as many.
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels are more than a slice has (at most {limit})")
            if image.mode.startswith(("I", "F")):
                # Pillow would clip them to 255, or cut off the lower half of each number.
                raise ValueError(
                    f"more than 8 bits a pixel ({image.mode}), which would be lost: save the series as NIfTI instead"
                )
            if image.format == "PNG" and header[PNG_BIT_DEPTH] > 8:  # Pillow opens such colours as 8 bits
                raise ValueError(
                    f"more than 8 bits a channel ({image.mode}), which would be lost: save the series as NIfTI instead"
                )
            # In this order, a palette's transparency makes no difference to its colours.
            coloured = image.convert("RGBA") if image.mode == "P" else image
            return np.asarray(coloured.convert("L"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"more pixels than a slice has: {error}") from error
    # All that Pillow's decoders raise on damaged files.
    except (OSError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(f"{DAMAGED}: {reason}") from error


def read_report(case_folder: str | Path) -> str:
    """
    The report of a case: what its `.txt` file says, see [`extract_report`]. It may be empty.

    Raises:
        FileNotFoundError: there is no text file.
        ValueError: there are several, or it is not in UTF-8.
    """
    path = find_report(case_folder)
    try:
        return extract_report(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected a text in UTF-8 ({error.reason} at byte {error.start}). Convert it."
        ) from error


def find_report(case_folder: str | Path) -> Path:
    """
    The one `.txt` file of a case.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    paths = _texts(Path(case_folder))
    if not paths:
        raise FileNotFoundError(f"{case_folder}: there is no report. Expected one .txt file.")
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"{case_folder}: expected one report, got {len(paths)} .txt files ({names}). Keep one.")
    return paths[0]


def extract_report(text: str) -> str:
    """
    The part of a text file of M3D-Cap that describes the scan, on one line.

    It is all that follows `study_findings:`; where that leaves fewer than 5 characters other than spaces, all that follows
    `discussion:`; and the whole text where that does too, or a heading is missing. A later heading ends neither.

    Example:

    ```python
    >>> extract_report("image_caption: axial\\nstudy_findings: Cyst in the\\nleft kidney.")
    'Cyst in the left kidney.'
    >>> extract_report("discussion: A cyst.\\nstudy_findings: -")
    'A cyst. study_findings: -'
    ```"""
    whole = text.replace("\n", " ").strip()
    for heading in ("study_findings:", "discussion:"):
        _, found, rest = whole.partition(heading)
        report = rest.strip() if found else whole
        if len(report.replace(" ", "")) >= MIN_REPORT_CHARACTERS:
            return report
    return whole


def to_ascii(name: str) -> str:
    """
    A name of a file in ASCII: letters lose their accents, and what has no ASCII form becomes `_`.

    Example:

    ```python
    >>> to_ascii("Pöschl_C__delayed")
    'Poschl_C__delayed'
    ```"""
    letters = "".join(ASCII_OF.get(letter, letter) for letter in unicodedata.normalize("NFC", name))
    apart = unicodedata.normalize("NFKD", letters)
    plain = "".join(letter for letter in apart if not unicodedata.combining(letter))
    return re.sub(r"[^\x20-\x7e]|/", "_", plain)  # a slash can appear on taking signs apart


def is_nifti_file(path: Path) -> bool:
    """Whether a path is that of a NIfTI file, by its name."""
    return path.name.lower().endswith(NIFTI_ENDINGS) and path.is_file()


def visible_entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without what systems hide in it, or leave in it on unpacking an archive of a Mac."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX")


def slice_number(path: Path) -> int | None:
    """The whole number that is the name of a slice; None if it is none. Python would take `1_10`, `+1` and `-1` for one, too."""
    return int(path.stem) if path.stem.isascii() and path.stem.isdecimal() else None


def describe_misnaming(path: Path, accept_jpg: bool = False) -> str:
    """What is wrong with the name of a file that would be a slice under another one, and what to do; else empty."""
    try:
        int(path.stem)
    except ValueError:
        return ""
    ending = path.suffix.lower()
    if ending not in _endings(accept_jpg):
        return ""
    if path.suffix != ending:
        return f"{MISNAMED}: rename to {ending}, in small letters"
    return f"{MISNUMBERED}: rename it, 0 or 1 being the first" if slice_number(path) is None else ""


def _endings(accept_jpg: bool) -> tuple[str, ...]:
    return (*SLICE_ENDINGS, ".jpg") if accept_jpg else SLICE_ENDINGS


def _sort_by_number(folder: Path, accept_jpg: bool) -> tuple[list[Path], list[DroppedSlice]]:
    numbered, dropped = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            dropped.append((path.name, "a folder"))
            continue
        if misnaming := describe_misnaming(path, accept_jpg):
            dropped.append((path.name, misnaming))
        elif not path.name.endswith(_endings(accept_jpg)):
            remedy = JPG_REMEDY if path.suffix == ".jpg" else "rename to .jpeg, in small letters"
            hint = f": {remedy}" if path.suffix.lower() == ".jpg" else ""
            dropped.append((path.name, f"not a .png or .jpeg file{hint}"))
        elif (number := slice_number(path)) is None:
            dropped.append((path.name, "its name is no whole number, so it has no place in the stack"))
        else:
            numbered.append((number, path.name, path))
    return [path for _, _, path in sorted(numbered)], dropped


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"


__all__ = [
    "DroppedSlice",
    "damaged_slices",
    "describe_damaged",
    "describe_misnaming",
    "describe_missing",
    "describe_repeated",
    "describe_rival_texts",
    "extract_report",
    "find_cases",
    "find_report",
    "find_rival_texts",
    "find_series",
    "folders_without_series",
    "is_damage",
    "is_misnaming",
    "is_nifti_file",
    "is_slice_folder",
    "missing_numbers",
    "open_scan",
    "read_picture",
    "read_report",
    "read_slices",
    "refuse_other_pictures",
    "remedy_for_endings",
    "repeated_numbers",
    "show_dropped",
    "slice_number",
    "to_ascii",
    "visible_entries",
]
