"""
Users' own studies: a manifest in CSV or JSON Lines that names scans with their reports, questions and answers.

Messages name rows and columns of a manifest, never what stands in them: reports, and often file names, are patient data.
"""

import csv
import difflib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..files import find_surrogate
from ..naming import name_a_few
from .m3d import (
    SKIP_HINT,
    SampleTable,
    SkipEmpty,
    check_split,
    choice_letter,
    hint_at_backslashes,
    parallel,
    question_type_number,
    read_csv_rows,
)
from .samples import CHOICE_LETTERS, SPLITS, Split, Task


logger = logging.get_logger(__name__)

# Columns of a manifest; all but `image` are optional.
CHOICE_COLUMNS = tuple(f"choice_{letter.lower()}" for letter in CHOICE_LETTERS)
COLUMNS = (
    "image",
    "case",
    "split",
    "report",
    "question",
    "answer",
    "choices",
    *CHOICE_COLUMNS,
    "answer_choice",
    "question_type",
)
# Of a manifest in a folder that is named instead.
MANIFEST_NAMES = ("manifest.csv", "manifest.jsonl")
SPLIT_NAMES: dict[str, Split] = {**{name: name for name in SPLITS}, "val": "validation"}
YES_AND_NO = ("yes", "no")
# What to do where a split has no sample.
SPLIT_HINTS: dict[str, str] = {
    "validation": " Put some cases into it, or train without it: training.eval_strategy=no."
}


@dataclass(frozen=True)
class ManifestRow:
    """
    One row of a manifest, read and checked.

    Attributes:
        number (`int`):
            Number of the row in a CSV file, as a spreadsheet shows it; of the line in a JSONL file, from 1.
        image (`str`):
            Absolute path of the scan.
        case (`str`):
            The patient or study.
        split (`str`):
            One of `SPLITS`, or empty.
        samples (`list[dict]`):
            One for the report and one for the question, where the row has them: the fields of `SAMPLE_FEATURES` other
            than `image` and `case`.
    """

    number: int
    image: str
    case: str
    split: str
    samples: list[dict[str, Any]]


def read_manifest(
    path: str | Path,
    split: Split | None = None,
    *,
    streaming: bool = False,
    check_files: bool = True,
    skip_empty: SkipEmpty = False,
    left_out: list[dict[str, str]] | None = None,
) -> Dataset | IterableDataset:
    r"""
    Reads a manifest of one's own studies.

    A `.csv` file has these columns, in any order; a `.jsonl` file one object a line with these keys. All texts are UTF-8
    and stay text: an answer `None` or `NA` is an answer. Unknown columns are refused.

    - `image`: the scan, a NIfTI file or a folder of slices. Absolute, or relative to the manifest's folder.
    - `report`: what is to be learnt as the scan's report.
    - `question`, `answer`: a question about the scan and its answer. The answers `yes` and `no` make it a yes/no question.
    - `choices`: makes it a closed question. Four texts, as a JSON list or with `|` between them; or in four columns
      `choice_a` to `choice_d`. `answer_choice` is the letter of the right one; given one of `answer` and `answer_choice`,
      the other may be left out.
    - `question_type`, optional: 1 or plane, 2 or phase, 3 or organ, 4 or abnormality, 5 or location.
    - `case`, optional: the patient or study that scans belong to, which must not be in two splits. Without it each
      scan is a case of its own.
    - `split`, optional: `train`, `validation` (or `val`), `test`. It counts for its row alone: a row without one is in no
      split, and a warning says so where other rows have one.

    A row may have both a report and a question, and a scan several rows.

    Args:
        path (`str` or `Path`):
            The manifest, `.csv` or `.jsonl`.
        split (`str`, *optional*):
            `"train"`, `"validation"` or `"test"`: only its rows. Without it all rows, whatever their split.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` of up to 64 shards instead.
        check_files (`bool`, *optional*, defaults to `True`):
            Look whether every scan exists.
        skip_empty (`bool` or `"keep"`, *optional*, defaults to `False`):
            Leave rows without a report or a complete question out, with a warning, instead of raising. `"keep"` leaves them in
            their places, see [`~train.data.m3d.missing_text`].
        left_out (`list`, *optional*):
            With `skip_empty`: gets a row `{"source": ..., "row": ..., "column": ..., "reason": ...}` for each sample left out.

    Returns:
        `datasets.Dataset` with `SAMPLE_FEATURES`, in the order of the rows; a report before the row's question.

    Raises:
        FileNotFoundError: the manifest or a scan is missing.
        ValueError: a column is unknown, a row is incomplete or contradicts itself, or no row is in `split`.

    Example:

    ```python
    >>> from med3dvlm.train.data.manifest import read_manifest, write_example_manifest

    >>> manifest = write_example_manifest("example_study")
    >>> dataset = read_manifest(manifest, "train")
    >>> dataset[0]["task"], dataset[0]["answer"]
    ('report', 'Axial CT. A cyst in the right lobe of the liver. The lungs are clear.')
    ```"""
    path = Path(path)
    if split is not None:
        check_split(split)
    table = SampleTable(path, skip_empty, left_out)
    rows_of_images: dict[str, int] = {}
    splits: dict[int, str] = {}
    for row in read_manifest_rows(path, may_lack_choices=bool(skip_empty)):
        splits[row.number] = row.split
        if split is not None and row.split != split:
            continue
        rows_of_images.setdefault(row.image, row.number)
        for sample in row.samples:
            table.add(f"row {row.number}", image=row.image, case=row.case, **sample)
    fault = describe_rows_without_split(splits)
    if split is not None and fault:
        logger.warning_once(f"{path}: {fault}.")
    if split is not None and not splits:
        raise ValueError(f"{path} has no rows.")
    if split is not None and split not in splits.values():
        found = (
            ", ".join(sorted(set(splits.values()) - {""}))
            or "no splits: add a column `split`; in Python, `split=None` reads all rows"
        )
        raise ValueError(f"{path} has no rows of the split {split}. It has {found}.{SPLIT_HINTS.get(split, '')}")
    if check_files:
        _check_scans_exist(path, rows_of_images)
    return table.build(streaming=streaming, check_files=False)


def describe_rows_without_split(splits: Mapping[int, str]) -> str:
    """
    What is wrong with rows that name no split while others do, and what to do.

    Args:
        splits (`Mapping[int, str]`):
            The split of each row by the row's number, empty for none.

    Returns:
        `str`, a sentence without its full stop; empty if all rows name one, or none does.
    """
    rows = [f"row {number}" for number, split in splits.items() if not split]
    if not rows or len(rows) == len(splits):
        return ""
    return (
        f"{len(rows)} of the {len(splits)} rows name no split and are left out wherever one is asked for: {name_a_few(rows)}; "
        "fill in `split` in every row"
    )


def find_manifest(root: Path) -> Path | None:
    """The manifest at `root`: the file itself, or `manifest.csv` or `manifest.jsonl` in the folder; None without one."""
    return next((path for path in (root, *(root / name for name in MANIFEST_NAMES)) if path.is_file()), None)


def read_manifest_rows(path: Path, may_lack_choices: bool = False) -> Iterator[ManifestRow]:
    """
    Reads a manifest row by row, see [`read_manifest`]. Scans are not looked for, and empty samples are passed on; those
    that lack some of their four choices only if they `may_lack_choices`, else they raise.

    Raises:
        FileNotFoundError: there is no such manifest.
        ValueError: it has the wrong form.
    """
    for number, cells in read_manifest_cells(path):
        yield parse_manifest_row(path, number, cells, may_lack_choices)


def read_manifest_cells(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the cells of each row of a manifest; column names are checked, their content is not."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: expected a manifest that ends in .csv or .jsonl, got {suffix or 'no ending'!r}.")
    if suffix == ".csv":
        yield from read_csv_rows(path, check_header=partial(_check_columns, f"{path}, header"))
        return
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _read_json_line(f"{path}, line {number}", line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def _read_json_line(where: str, line: str) -> dict[str, Any]:
    try:
        cells = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}, is not valid JSON: {error}.") from error
    if (half := find_surrogate(json.dumps(cells, ensure_ascii=False))) is not None:
        raise ValueError(f"{where}: half of a character ('{half}'), which no file can hold. Write the whole one.")
    if not isinstance(cells, dict):
        raise ValueError(f'{where}: expected an object such as {{"image": ..., "report": ...}} on each line.')
    _check_columns(where, cells)
    return {name: "" if value is None else value for name, value in cells.items()}


def _check_columns(where: str, names: Collection[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.lower(), COLUMNS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown column {name!r}.{hint} Known ones: {', '.join(COLUMNS)}.")
    if "image" not in names:
        raise ValueError(f"{where}: there is no column 'image'. Expected the path of a scan in it.")
    if "choices" in names and any(name in names for name in CHOICE_COLUMNS):
        raise ValueError(f"{where}: expected 'choices' or 'choice_a' to 'choice_d', got both. Keep one of them.")


def parse_manifest_row(path: Path, number: int, cells: dict[str, Any], may_lack_choices: bool = False) -> ManifestRow:
    """
    Makes samples of a row's cells.

    Args:
        path (`Path`):
            The manifest.
        number (`int`):
            Number of the row.
        cells (`dict`):
            As [`read_manifest_cells`] gives them.
        may_lack_choices (`bool`, *optional*, defaults to `False`):
            Whether a question with some of its four choices empty is passed on, its answer as it stands, or raises.

    Returns:
        [`ManifestRow`].

    Raises:
        ValueError: the row contradicts itself, or a cell has the wrong form.
    """
    where = f"{path}, row {number}"
    texts = {name: _text(cells.get(name, ""), name, where) for name in COLUMNS if name != "choices"}
    if not texts["image"]:
        raise ValueError(f"{where}: expected the path of a scan as 'image', got an empty cell.")
    split = texts["split"].lower()
    if split and split not in SPLIT_NAMES:
        raise ValueError(f"{where}: expected a split out of {', '.join(SPLIT_NAMES)} or none, got another word.")
    samples = []
    question = _question_sample(texts, _choices(cells, texts, where, may_lack_choices), where)
    if texts["report"] or question is None:
        samples.append({"task": "report", "answer": texts["report"]})
    if question is not None:
        samples.append(question)
    image = os.path.abspath(path.parent / texts["image"])  # noqa: PTH100 (links stay: the folder is named as given)
    return ManifestRow(number, image, texts["case"] or texts["image"], SPLIT_NAMES.get(split, ""), samples)


def _text(value: Any, name: str, where: str) -> str:
    if name == "question_type" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text as {name!r}, got {type(value).__name__}. Put it in quotes.")
    return _plain(value)


def _plain(text: str) -> str:
    """Without white space at its ends, and with line breaks as text files have them here: JSON may bring those of Windows."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _choices(cells: dict[str, Any], texts: dict[str, str], where: str, may_lack_some: bool) -> list[str]:
    """The four choices of a row, or none; some of the four may be empty if the row `may_lack_some`."""
    value = cells.get("choices", "")
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where}: 'choices' starts like a JSON list but is not valid JSON: {error}.") from error
    if isinstance(value, str):
        value = value.split("|") if value.strip() else [texts[name] for name in CHOICE_COLUMNS]
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"{where}: expected a list of texts as 'choices', got another form. Put each in quotes.")
    choices = [_plain(choice) for choice in value]
    if not any(choices):
        return []
    count = sum(map(bool, choices))
    are_four = len(choices) == len(CHOICE_LETTERS)
    if not are_four or (count < len(choices) and not may_lack_some):
        remedy = (
            "To do without such rows, set data.skip_broken=true in a recipe, or give --skip-broken to an evaluation."
        )
        hint = f" {remedy}" if are_four else ""
        raise ValueError(f"{where}: expected four choices, A to D, got {count}. An open question has none.{hint}")
    return choices


def _question_sample(texts: dict[str, str], choices: list[str], where: str) -> dict[str, Any] | None:
    """The question of a row; `None` if it has none, so that the row is one of a report."""
    answer = texts["answer"]
    if not (texts["question"] or answer or choices or texts["answer_choice"]):
        return None
    letter = ""
    if choices and not all(choices):
        # Left out by whoever reads it, for its choices: the right one may be the one that is missing.
        answer = answer or texts["answer_choice"]
    elif choices:
        letter, answer = _right_choice(texts, choices, where)
    elif texts["answer_choice"]:
        raise ValueError(f"{where}: has an 'answer_choice' and no choices. Fill in 'choices', or leave it empty.")
    is_yes_no = answer.lower().rstrip(".") in YES_AND_NO
    task: Task = "closed_vqa" if choices else "yes_no_vqa" if is_yes_no else "open_vqa"
    return {
        "task": task,
        "question": texts["question"],
        "choices": choices,
        "answer": answer,
        "answer_choice": letter,
        "question_type": question_type_number(texts["question_type"], where, show=False),
    }


def _right_choice(texts: dict[str, str], choices: list[str], where: str) -> tuple[str, str]:
    """Letter and text of the right choice, of which one may be missing."""
    if texts["answer_choice"]:
        letter = choice_letter(texts["answer_choice"], where, show=False)
        choice = choices[CHOICE_LETTERS.index(letter)]
        if texts["answer"] and texts["answer"] != choice:
            raise ValueError(f"{where}: 'answer' is not the text of the choice {letter}, which 'answer_choice' names.")
        return letter, choice
    if not texts["answer"]:
        raise ValueError(
            f"{where}: neither 'answer', the text of the right choice, nor 'answer_choice', its letter, is filled in."
        )
    if choices.count(texts["answer"]) != 1:
        raise ValueError(
            f"{where}: expected an 'answer' that is the text of one choice, got one that is the text of "
            f"{choices.count(texts['answer'])}. Name the right choice by its letter in 'answer_choice'."
        )
    return CHOICE_LETTERS[choices.index(texts["answer"])], texts["answer"]


def _check_scans_exist(path: Path, rows_of_images: dict[str, int]) -> None:
    images = list(rows_of_images)
    missing = [image for image, exists in zip(images, parallel(os.path.exists, images)) if not exists]
    if missing:
        rows = name_a_few([f"row {rows_of_images[image]}" for image in missing])
        raise FileNotFoundError(
            f"{len(missing)} of the {len(images)} scans in {path} do not exist: {rows}. Paths are relative to the "
            f"manifest's folder, or absolute{hint_at_backslashes(missing)}. {SKIP_HINT}"
        )


def write_example_manifest(destination: str | Path) -> Path:
    """
    Writes a worked example: five small synthetic CT scans and the manifest that describes them.

    The scans (NIfTI, HU, 24 x 32 x 28 voxels or an order of these axes) differ in spacing and orientation. Each shows a
    body with lungs and liver and one finding. `manifest.csv` has a report of each, and open, closed and yes/no questions;
    four cases are for training, one for validation.

    Args:
        destination (`str` or `Path`):
            A new or empty folder.

    Returns:
        `Path` of the manifest.

    Raises:
        FileExistsError: the folder is not empty.
    """
    import nibabel

    destination = Path(destination)
    if destination.exists() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is not empty. Expected a new folder for the example.")
    destination.mkdir(parents=True, exist_ok=True)
    for index, (finding, spacing, codes) in enumerate(EXAMPLE_SCANS, start=1):
        scan = nibabel.Nifti1Image(_example_scan(finding, seed=index), np.diag([*spacing, 1.0]))  # (R, A, S)
        scan.set_qform(scan.affine, code=1)
        orientation = nibabel.orientations.axcodes2ornt(codes)
        scan = scan.as_reoriented(nibabel.orientations.ornt_transform(_RAS, orientation))
        nibabel.save(scan, destination / f"scan_{index}.nii.gz")
    manifest = destination / "manifest.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(EXAMPLE_COLUMNS)
        writer.writerows(EXAMPLE_ROWS)
    return manifest


_RAS = [[0, 1], [1, 1], [2, 1]]  # nibabel's description of axes that grow to the right, to anterior, to superior

# Finding, spacing in mm along the patient's (right-left, anterior-posterior, superior-inferior) axis, and stored axes.
EXAMPLE_SCANS: list[tuple[str, tuple[float, float, float], str]] = [
    ("liver cyst", (14.0, 9.0, 12.0), "LPS"),
    ("right lung nodule", (13.5, 8.5, 12.0), "RAS"),
    ("left lung nodule", (14.0, 9.5, 11.0), "LAS"),
    ("none", (13.0, 9.0, 12.5), "SPL"),
    ("liver calcification", (14.5, 9.0, 11.5), "RPI"),
]
EXAMPLE_COLUMNS = (
    "image",
    "case",
    "split",
    "report",
    "question",
    "answer",
    "choices",
    "answer_choice",
    "question_type",
)
# The empty cells at the end of a row are those of the columns it does not need.
EXAMPLE_ROWS: list[tuple[str, ...]] = [
    # A report alone, and a row with a report and a question.
    ("scan_1.nii.gz", "case_1", "train", "Axial CT. A cyst in the right lobe of the liver. The lungs are clear.", *[""] * 5),
    ("scan_2.nii.gz", "case_2", "train", "Axial CT. A nodule in the right lung. The liver is normal.",
     "Where is the nodule?", "In the right lung.", "", "", "location"),
    ("scan_3.nii.gz", "case_3", "train", "Axial CT. A nodule in the left lung. The liver is normal.", *[""] * 5),
    ("scan_4.nii.gz", "case_4", "train", "Axial CT. The lungs are clear. The liver is normal.", *[""] * 5),
    ("scan_5.nii.gz", "case_5", "validation", "Axial CT. A calcification in the liver. The lungs are clear.", *[""] * 5),
    # Closed questions: with the letter of the right choice, or with its text.
    ("scan_1.nii.gz", "case_1", "train", "", "Which organ shows an abnormality?", "",
     "lung|liver|spleen|kidney", "B", "organ"),
    ("scan_3.nii.gz", "case_3", "train", "", "Which lung has a nodule?", "Left",
     '["Right", "Left", "Both", "None"]', "", "5"),
    ("scan_5.nii.gz", "case_5", "validation", "", "Which abnormality is there?", "calcification",
     "cyst|nodule|calcification|none", "C", "abnormality"),
    # Yes/no questions.
    ("scan_2.nii.gz", "case_2", "train", "", "Is there a nodule?", "Yes", "", "", "abnormality"),
    ("scan_4.nii.gz", "case_4", "train", "", "Is there a nodule?", "No", "", "", "abnormality"),
    ("scan_5.nii.gz", "case_5", "validation", "", "Are the lungs clear?", "Yes", "", "", "abnormality"),
]  # fmt: skip


def _example_scan(finding: str, seed: int) -> np.ndarray:
    """A scan in HU: `np.ndarray` of shape (24, 32, 28), its axes growing to the right, to anterior, to superior."""
    shape = (24, 32, 28)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))

    def ball(center: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        offsets = (grid - np.reshape(center, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
        return (offsets**2).sum(axis=0) <= 1

    scan = np.full(shape, -1000.0)
    scan[ball((0, 0, 0), (0.9, 0.75, 1.3))] = 40
    right_lung, left_lung = (0.42, 0.0, 0.4), (-0.42, 0.0, 0.4)
    for center in (right_lung, left_lung):
        scan[ball(center, (0.3, 0.5, 0.5))] = -800
    liver = (0.4, 0.1, -0.55)
    scan[ball(liver, (0.4, 0.5, 0.35))] = 110
    lesions = {
        "liver cyst": (liver, 5.0),
        "liver calcification": (liver, 700.0),
        "right lung nodule": (right_lung, 60.0),
        "left lung nodule": (left_lung, 60.0),
    }
    if finding in lesions:
        center, hounsfield_units = lesions[finding]
        scan[ball(center, (0.15, 0.15, 0.15))] = hounsfield_units
    noise = np.random.default_rng(seed).normal(0, 10, shape)
    return np.clip(scan + noise, -1024, 3071).astype(np.int16)


__all__ = [
    "ManifestRow",
    "describe_rows_without_split",
    "find_manifest",
    "parse_manifest_row",
    "read_manifest",
    "read_manifest_rows",
    "write_example_manifest",
]
