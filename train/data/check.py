"""
The integrity check before training, `med3dvlm prepare check DIR`: reads every volume and every row, and lists what is wrong.

Problems have one of three severities. An error would stop the training or teach something false: a volume that cannot be
read, an empty report, a case in two splits. A warning is worth a look: a volume twice in one split, an unlikely voxel size.
An information is neither: reports that are the same in two splits, which M3D has many of. Reasons never quote texts.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...processing.image_processing_med3dvlm import is_ct_in_hu
from ...processing.volume_io import (
    InvalidVolumeError,
    open_volume,
    orient,
    read_stored_voxels,
    scale_stored,
    spacing_of,
)
from ..files import write_json_atomically
from ..processes import count_usable_cores
from .layout import CAP_INDEX, CHOICE_COLUMNS, QUESTION_COLUMNS, VQA_FOLDER, vqa_file
from .m3d import (
    case_of,
    hint_at_backslashes,
    parallel,
    parse_question,
    read_cap_index,
    read_csv_rows,
    resolve_image,
)
from .manifest import describe_rows_without_split, find_manifest, parse_manifest_row, read_manifest_cells
from .preparation_record import read_preparation_record
from .samples import CHOICE_LETTERS, SPLITS
from .slices import (
    damaged_slices,
    describe_damaged,
    describe_missing,
    describe_repeated,
    is_nifti_file,
    is_slice_folder,
    missing_numbers,
    read_slices,
    refuse_other_pictures,
    repeated_numbers,
    show_dropped,
)


Severity = Literal["error", "warning", "info"]
Volumes = Literal["auto", "scans", "prepared"]

CACHE_ENDING = ".safetensors"
# Voxels of medical scans lie within these lengths in mm; beyond them a header was probably written in another unit.
LIKELY_SPACING = (0.05, 20.0)


@dataclass(frozen=True)
class Problem:
    """
    One thing that is wrong.

    Attributes:
        severity (`str`):
            `"error"`, `"warning"` or `"info"`.
        kind (`str`):
            A short name of the kind of problem, such as `"missing_volume"`.
        file (`str`):
            Path of the file it is in.
        row (`int` or `str`, *optional*):
            Its row in a table, or its place in a JSON file.
        reason (`str`):
            What was expected, and what was found.
    """

    severity: Severity
    kind: str
    file: str
    row: int | str | None
    reason: str


@dataclass
class CheckReport:
    """
    What [`check_study`] found.

    Attributes:
        root (`str`):
            What was checked.
        layout (`str`):
            `"m3d"`, `"manifest"`, `"volumes"` or `"cache"`.
        volumes (`str`):
            `"scans"` or `"prepared"`: as what the volumes were checked.
        is_fast (`bool`):
            Whether only headers were read.
        num_volumes (`int`):
            Files of volumes named by the samples, or found.
        num_samples (`dict[str, dict[str, int]]`):
            Rows by split and task; the split is `""` where rows name none.
        shapes (`dict[str, int]`):
            How many volumes have each shape, (depth, height, width), the most frequent first.
        problems (`list[Problem]`):
            Errors first.
    """

    root: str
    layout: str
    volumes: str
    is_fast: bool
    num_volumes: int = 0
    num_samples: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def count(self, severity: Severity) -> int:
        """Number of problems of a severity."""
        return sum(problem.severity == severity for problem in self.problems)

    @property
    def is_ok(self) -> bool:
        """Whether there are no errors. Warnings are fine."""
        return self.count("error") == 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it, with the number of problems by severity and kind in front of the list."""
        kinds = {severity: Counter(p.kind for p in self.problems if p.severity == severity) for severity in SEVERITIES}
        content = asdict(self)
        rows = content.pop("problems")
        return {**content, "counts": kinds, "problems": rows}


SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class _Row:
    """A sample as it stands in its file, right or wrong. `answer` is `None` if its file could not be read."""

    file: str
    row: int | str
    split: str
    image: str
    case: str
    task: str
    answer: str | None
    question: str = ""
    choices: tuple[str, ...] = ()
    answer_choice: str = ""


@dataclass
class _VolumeFacts:
    """
    What one volume's file says. `shape` is (depth, height, width), as the image processor brings it; `is_ct` tells whether its
    `intensity_mode` "auto" would take the values for HU; `has_record`, looked for where values are not read, whether our
    preparation wrote it.
    """

    shape: tuple[int, ...] | None = None
    is_folder: bool = False
    is_float: bool = False
    has_record: bool = False
    value_range: tuple[float, float] | None = None
    is_ct: bool = False
    digest: str = ""
    problems: list[tuple[Severity, str, str]] = field(default_factory=list)


def check_study(
    root: str | Path,
    *,
    volumes: Volumes = "auto",
    image_size: Sequence[int] | None = None,
    fast: bool = False,
    num_workers: int | None = None,
    progress: bool = False,
    report_path: str | Path | None = None,
) -> CheckReport:
    """
    Checks a data set before training.

    What lies at `root` is found out: a manifest (`.csv` or `.jsonl`, or a folder that holds `manifest.csv` or
    `manifest.jsonl`), the layout of M3D (`M3D_Cap_npy/M3D_Cap.json` and `M3D-VQA/*.csv`, either or both), a folder of
    NIfTI files or a single one, or the folder of a `VolumeCache`.

    Errors are:

    - files that cannot be read, data without a sample, unknown columns, splits, letters and question types, rows that
      contradict themselves;
    - missing volumes and reports, empty reports, questions, answers and choices, an answer that is not the text of the
      choice that its letter names;
    - volumes that cannot be read or are no single 3D volume, hold NaN or infinity, or one value only, damaged or
      misnamed slices; for prepared ones also another shape than `image_size` or the others have, integers, and values
      outside [0, 1];
    - the same volume file, the same case, or the same voxels in two splits.

    Warnings are the same voxels, or the same report or question of a volume, twice in a split, choices that are the same,
    files that are not among the slices of a folder, slices with one number, numbers of slices that are missing, an unlikely
    voxel size, scans that do not say how the patient lies, and rows of a manifest without a split where others have one.

    Args:
        root (`str` or `Path`):
            Folder, manifest or scan.
        volumes (`str`, *optional*, defaults to `"auto"`):
            `"prepared"` volumes, as `med3dvlm prepare m3d-cap` writes them, are held to one shape and [0, 1]; `"scans"`
            are not. `"auto"` takes them as prepared if `image_size` is given, or if most of them are stored as
            floating-point numbers in [0, 1] and of the same shape. With `fast`, which reads no values, those count that
            `med3dvlm prepare m3d-cap` has written, or that lie in the layout of M3D.
        image_size (`Sequence[int]`, *optional*):
            Voxels of prepared volumes along (depth, height, width). Without it, the most frequent shape is expected.
        fast (`bool`, *optional*, defaults to `False`):
            Read only the headers of volumes: damaged data, NaN, values and identical voxels are not found.
        num_workers (`int`, *optional*):
            Volumes read at a time, up to 8 by default.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        report_path (`str` or `Path`, *optional*):
            Where to write the report as JSON. The file appears as a whole or not at all.

    Returns:
        [`CheckReport`].

    Raises:
        FileNotFoundError: there is no `root`.
        ValueError: it holds nothing that is known, or an option is wrong.

    Example:

    ```python
    >>> report = check_study("data", image_size=(128, 256, 256), report_path="check.json")
    >>> report.is_ok, report.count("error")
    ```"""
    expected_shape = _check_options(volumes, image_size, num_workers)
    root = Path(root)
    problems: list[Problem] = []
    layout, rows = _read_rows(root, problems)
    if not rows and not problems:
        problems.append(Problem("error", "no_samples", str(root), None, "it holds no samples"))
    first_rows: dict[str, _Row] = {}
    for row in rows:
        first_rows.setdefault(row.image, row)
    has_rows = layout in ("manifest", "m3d")
    if not has_rows:
        rows = []  # nothing but files: they have no texts and no splits
    problems += _text_problems(rows)
    images = _existing_images(first_rows, problems)
    facts = _read_volumes(images, fast, num_workers or min(8, count_usable_cores()), progress)
    is_prepared = volumes == "prepared" or layout == "cache" or image_size is not None
    is_prepared = is_prepared or (volumes == "auto" and _look_prepared(facts, layout == "m3d"))
    shapes = _expected_shapes(facts, expected_shape)
    for image, found in facts.items():
        row = first_rows[image]
        listed = found.problems + (_prepared_problems(found, shapes[_group_of(image)]) if is_prepared else [])
        for severity, kind, reason in listed:
            if not (is_prepared and kind in SCAN_ONLY):
                problems.append(Problem(severity, kind, image, row.row if has_rows else None, reason))
    if not is_prepared:
        problems += _mixed_intensities(facts, first_rows if has_rows else {})
    problems += _overlaps(rows, facts, first_rows)
    report = CheckReport(
        root=str(root),
        layout=layout,
        volumes="prepared" if is_prepared else "scans",
        is_fast=fast,
        num_volumes=len(first_rows),
        num_samples=_count_samples(rows),
        shapes=_count_shapes(facts),
        problems=sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity)),
    )
    if report_path is not None:
        write_json_atomically(report.to_dict(), Path(report_path))
    return report


def format_check_report(report: CheckReport, limit: int = 10) -> str:
    """
    The report as text for a terminal.

    Args:
        report ([`CheckReport`]):
            What was found.
        limit (`int`, *optional*, defaults to 10):
            Problems of each kind that are shown; the others are counted.

    Returns:
        `str`.
    """
    lines = [f"{report.root}: {report.layout}, {report.num_volumes} volumes, checked as {report.volumes}"]
    if report.is_fast:
        lines[0] += ", headers only"
    for split, tasks in report.num_samples.items():
        lines.append(f"  {split or 'no split'}: {', '.join(f'{count} {task}' for task, count in tasks.items())}")
    if report.shapes:
        shown = [f"{count} of {shape}" for shape, count in list(report.shapes.items())[:3]]
        more = f" and {len(report.shapes) - 3} more shapes" if len(report.shapes) > 3 else ""
        lines.append(f"  shapes (depth x height x width): {', '.join(shown)}{more}")
    by_kind: dict[tuple[Severity, str], list[Problem]] = defaultdict(list)
    for problem in report.problems:
        by_kind[problem.severity, problem.kind].append(problem)
    for (severity, kind), found in by_kind.items():
        lines.append(f"{severity}: {kind.replace('_', ' ')} ({len(found)})")
        for problem in found[:limit]:
            place = problem.file if problem.row is None else f"{problem.file}, row {problem.row}"
            lines.append(f"  {place}: {problem.reason}")
        if len(found) > limit:
            lines.append(f"  and {len(found) - limit} more")
    lines.append(", ".join(f"{report.count(severity)} {PLURALS[severity]}" for severity in SEVERITIES) + ".")
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # a name that is not UTF-8 cannot be printed


PLURALS: dict[Severity, str] = {"error": "errors", "warning": "warnings", "info": "information"}
# Said of scans alone: prepared volumes of M3D have lost the geometry, and that is known.
SCAN_ONLY = ("unlikely_spacing", "unknown_orientation")


def _check_options(volumes: str, image_size: Sequence[int] | None, num_workers: int | None) -> tuple[int, ...] | None:
    """The shape (depth, height, width) that prepared volumes must have, if it is known."""
    if volumes not in get_args(Volumes):
        raise ValueError(f"`volumes` must be one of {', '.join(get_args(Volumes))}, got {volumes!r}.")
    if volumes == "scans" and image_size is not None:
        raise ValueError("`image_size` is that of prepared volumes; scans may have any. Leave one of the options out.")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    if image_size is None:
        return None
    if len(image_size) != 3 or min(image_size) < 1:
        raise ValueError(f"`image_size` must be three numbers of voxels (depth, height, width), got {image_size}.")
    return tuple(image_size)


def _read_rows(root: Path, problems: list[Problem]) -> tuple[str, list[_Row]]:
    """The layout of what lies at `root`, and its rows; for a folder of volumes, or a single one, one for each file."""
    if not root.exists():
        raise FileNotFoundError(f"There is no {root}. Expected a folder, a manifest or a scan.")
    manifest = None if is_nifti_file(root) else find_manifest(root)
    if manifest is not None:
        return "manifest", _read_manifest(manifest, problems)
    if any((root / name).is_file() for name in (CAP_INDEX, *VQA_FILES)):
        return "m3d", [*_read_cap(root, problems), *_read_vqa(root, problems)]
    found = [root] if root.is_file() else [path for path in root.rglob("*") if path.name[0] != "."]
    files = sorted((path.absolute() for path in found), key=str)
    scans = [str(path) for path in files if is_nifti_file(path)]
    cached = [str(path) for path in files if path.name.endswith(CACHE_ENDING)]
    if not scans and not cached:
        raise ValueError(
            f"{root} holds nothing to check. Expected a manifest (manifest.csv or manifest.jsonl), {CAP_INDEX} or "
            f"{VQA_FOLDER}/*.csv of M3D, NIfTI files, or a cache of volumes. Slice folders of M3D-Cap are prepared first: `med3dvlm prepare "
            "m3d-cap`."
        )
    layout, images = ("volumes", scans) if scans else ("cache", cached)
    return layout, [_Row(image, "", "", image, "", "report", "") for image in images]


# Split and task of each file of M3D-VQA.
VQA_FILES = {vqa_file(split, task): (split, task) for task in ("closed_vqa", "yes_no_vqa") for split in SPLITS}


def _read_manifest(path: Path, problems: list[Problem]) -> list[_Row]:
    rows = []

    def read(number: int, cells: dict[str, Any]) -> None:
        row = parse_manifest_row(path, number, cells)
        for sample in row.samples:
            texts = {name: sample.get(name, "") for name in ("task", "question", "answer", "answer_choice")}
            choices = tuple(sample.get("choices", ()))
            rows.append(_Row(str(path), number, row.split, row.image, row.case, choices=choices, **texts))

    _read_each(path, read_manifest_cells(path), read, problems)
    left_out = describe_rows_without_split({int(row.row): row.split for row in rows})
    if left_out:
        problems.append(Problem("warning", "no_split", str(path), None, left_out))
    return rows


def _read_cap(root: Path, problems: list[Problem]) -> list[_Row]:
    path = root / CAP_INDEX
    rows: list[_Row] = []
    if not path.is_file():
        return rows
    for split in SPLITS:
        try:
            entries = read_cap_index(path, split)
        except ValueError as error:
            problems.append(Problem("error", "invalid_file", str(path), None, str(error).removeprefix(f"{path}: ")))
            continue
        reports = [root / report for _, report in entries]
        texts: list[str | Exception | None] = list(parallel(_read_report, reports))
        for index, ((image, _), report, text) in enumerate(zip(entries, reports, texts)):
            place = f'"{split}"[{index}]'
            if isinstance(text, Exception):
                is_missing = isinstance(text, FileNotFoundError)
                kind, reason = ("missing_report", "no such file") if is_missing else ("unreadable_report", str(text))
                problems.append(Problem("error", kind, str(report), place, reason))
                text = None
            rows.append(_Row(str(path), place, split, resolve_image(root, image), case_of(image), "report", text))
    return rows


def _read_report(path: Path) -> str | Exception:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        return error


def _read_vqa(root: Path, problems: list[Problem]) -> list[_Row]:
    rows: list[_Row] = []
    for name, (split, task) in VQA_FILES.items():
        path = root / name
        if path.is_file():
            columns = (*QUESTION_COLUMNS, *CHOICE_COLUMNS) if task == "closed_vqa" else QUESTION_COLUMNS
            read = partial(_read_question, rows, root, path, split, task)
            _read_each(path, read_csv_rows(path, columns), read, problems)
    return rows


def _read_question(
    rows: list[_Row], root: Path, path: Path, split: str, task: str, number: int, cells: dict[str, str]
) -> None:
    sample = parse_question(f"{path}, row {number}", cells, task)
    image, choices = sample["image"], tuple(sample["choices"])
    texts = {name: sample[name] for name in ("question", "answer", "answer_choice")}
    place = resolve_image(root, image)
    rows.append(_Row(str(path), number, split, place, case_of(image), task, choices=choices, **texts))


def _read_each(
    path: Path, rows: Iterable[tuple[int, Any]], read: Callable[[int, Any], None], problems: list[Problem]
) -> None:
    """Reads row by row; a bad row is listed, and the next one read. A fault of the file's form ends its reading."""
    try:
        for number, cells in rows:
            try:
                read(number, cells)
            except ValueError as error:
                problems.append(
                    Problem("error", "invalid_row", str(path), number, _without_place(error, path, number))
                )
    except ValueError as error:
        problems.append(Problem("error", "invalid_file", str(path), None, str(error).removeprefix(f"{path}: ")))


def _without_place(error: ValueError, path: Path, number: int) -> str:
    return str(error).removeprefix(f"{path}, row {number}: ")


def _text_problems(rows: Iterable[_Row]) -> list[Problem]:
    problems: list[Problem] = []
    asked: set[tuple[str, ...]] = set()
    reported: set[tuple[str, ...]] = set()
    for row in rows:

        def add(severity: Severity, kind: str, reason: str, row: _Row = row) -> None:
            problems.append(Problem(severity, kind, row.file, row.row, reason))

        if row.answer == "":
            name = "report" if row.task == "report" else "answer"
            add("error", f"empty_{name}", f"expected a text, got an empty {name}")
        if row.task == "report":
            report = (row.split, row.image, _plain(row.answer or ""))
            if row.answer and report in reported:
                add("warning", "repeated_report", "the same report of the same volume stands in an earlier row")
            reported.add(report)
            continue
        if not row.question:
            add("error", "empty_question", "expected a text, got an empty question")
        question = (row.split, row.image, row.task, row.question, *row.choices)
        if question in asked:
            add("warning", "repeated_question", "the same question about the same volume stands in an earlier row")
        asked.add(question)
        if not row.choices:
            continue
        if not all(row.choices):
            add("error", "empty_choice", "expected four choices, got an empty one")
        elif len({_plain(choice) for choice in row.choices}) < len(row.choices):
            add("warning", "repeated_choice", "two choices are the same")
        if row.answer and _plain(row.answer) != _plain(row.choices[CHOICE_LETTERS.index(row.answer_choice)]):
            add("error", "contradictory_answer", f"the answer is not the text of the choice {row.answer_choice}")
    return problems


def _plain(text: str) -> str:
    """A text without what does not change its meaning: case, white space, a full stop at the end."""
    return " ".join(text.casefold().split()).rstrip(".")


def _existing_images(first_rows: dict[str, _Row], problems: list[Problem]) -> list[str]:
    images = list(first_rows)
    existing = []
    for image, exists in zip(images, parallel(os.path.exists, images)):
        if exists:
            existing.append(image)
        else:
            row = first_rows[image]
            reason = f"there is no volume {image}{hint_at_backslashes([image])}"
            problems.append(Problem("error", "missing_volume", row.file, row.row, reason))
    return existing


def _read_volumes(images: list[str], fast: bool, num_workers: int, progress: bool) -> dict[str, _VolumeFacts]:
    from tqdm import tqdm

    # Threads: reading waits for the disk, and unpacking, hashing and NumPy let go of the interpreter.
    with ThreadPoolExecutor(num_workers) as pool:
        facts = pool.map(partial(_read_volume, fast=fast), images)
        done = list(tqdm(facts, "volumes", len(images), unit="volume", disable=not progress))
    return dict(zip(images, done))


def _read_volume(image: str, fast: bool) -> _VolumeFacts:
    facts = _VolumeFacts()
    try:
        if image.endswith(CACHE_ENDING):
            _read_cached_volume(image, fast, facts)
        else:
            _read_scan(image, fast, facts)
    except (InvalidVolumeError, OSError, EOFError) as error:
        facts.problems.append(("error", "invalid_volume", str(error).removeprefix(f"{image}: ")))
    return facts


def _read_scan(image: str, fast: bool, facts: _VolumeFacts) -> None:
    facts.is_folder = Path(image).is_dir()
    volume = open_volume(_stack_slices(image, facts) if facts.is_folder else image)
    # Nothing is read for it: an array of one number, seen in the stored shape.
    facts.shape = orient(np.broadcast_to(0, volume.shape[:3]), volume.affine, "LPS")[0].shape
    facts.is_float = np.issubdtype(volume.dtype, np.floating)
    if min(volume.shape[:3]) < 2:
        facts.problems.append(("error", "invalid_volume", f"expected a volume, got shape {volume.shape}"))
    _check_geometry(volume, facts)
    if not fast:
        _check_voxels(facts, *read_stored_voxels(volume))
        return
    facts.has_record = not facts.is_folder and read_preparation_record(image) is not None
    if np.prod(volume.shape[3:]) > 1:
        facts.problems.append(
            ("error", "invalid_volume", f"expected one volume, got a series of shape {volume.shape}")
        )


def _stack_slices(image: str, facts: _VolumeFacts) -> np.ndarray:
    folder = Path(image)
    if not is_slice_folder(folder):
        refuse_other_pictures(folder)
        raise InvalidVolumeError(f"{folder}: expected a NIfTI file or a folder of slices, got another folder.")
    stack, dropped = read_slices(folder)
    damaged = damaged_slices(dropped)
    others = [entry for entry in dropped if entry not in damaged]
    repeated, missing = repeated_numbers(folder, dropped), missing_numbers(folder)
    if damaged:
        facts.problems.append(("error", "damaged_slices", describe_damaged(len(stack), damaged)))
    if others:
        reason = f"{len(others)} files are not among the slices ({show_dropped(others)})"
        facts.problems.append(("warning", "not_among_slices", reason))
    if repeated:
        facts.problems.append(("warning", "repeated_slice_number", describe_repeated(repeated)))
    if missing:
        facts.problems.append(("warning", "missing_slice_numbers", describe_missing(missing)))
    return stack


def _read_cached_volume(path: str, fast: bool, facts: _VolumeFacts) -> None:
    """A file of a `VolumeCache`. It keeps numbers in [0, 1]; as integers, multiples of 1/255."""
    from safetensors import SafetensorError, safe_open

    from .cache import TENSOR_NAME

    try:
        with safe_open(path, framework="np") as content:
            facts.shape = tuple(content.get_slice(TENSOR_NAME).get_shape())
            facts.is_float = True
            if len(facts.shape) != 3:
                reason = f"expected (depth, height, width), got {facts.shape}"
                facts.problems.append(("error", "invalid_volume", reason))
            elif not fast:
                voxels = content.get_tensor(TENSOR_NAME)
                _check_voxels(facts, voxels)
                if voxels.dtype == np.uint8:
                    facts.value_range = None  # nothing else than [0, 1] can be stored
    except SafetensorError as error:
        raise InvalidVolumeError(f"{path}: damaged ({error}). Delete it; it is made again when needed.") from error


def _check_geometry(volume: Any, facts: _VolumeFacts) -> None:
    spacing = spacing_of(volume.affine)
    if spacing is not None and not LIKELY_SPACING[0] <= min(spacing) <= max(spacing) <= LIKELY_SPACING[1]:
        lengths = ", ".join(f"{length:g}" for length in spacing)
        reason = f"voxels of {lengths} mm; expected {LIKELY_SPACING[0]:g} to {LIKELY_SPACING[1]:g}"
        facts.problems.append(("warning", "unlikely_spacing", reason))
    if spacing is not None and not volume.is_orientation_known:
        reason = "the header does not say how the patient lies (qform_code and sform_code are 0)"
        facts.problems.append(("warning", "unknown_orientation", reason))


def _check_voxels(facts: _VolumeFacts, voxels: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> None:
    """Voxels as they are stored, and the scaling (slope above 0) that is still to be applied, here to the ends alone."""
    ends = scale_stored(np.stack([voxels.min(), voxels.max()]), slope, intercept)  # NaN if one voxel is
    low, high = map(float, ends)
    if not np.isfinite([low, high]).all():
        count = int((~np.isfinite(scale_stored(voxels, slope, intercept))).sum())
        facts.problems.append(("error", "not_finite", f"{count} of {voxels.size} voxels are NaN or infinite"))
    elif low == high:
        facts.problems.append(("error", "constant", f"all voxels are {low:g}"))
    facts.value_range = (low, high)
    facts.is_ct = is_ct_in_hu(low, high, lambda: float(voxels.mean(dtype=np.float64)) * slope + intercept)
    digest = hashlib.blake2b(str((voxels.shape, voxels.dtype.str, slope, intercept)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(voxels.T))  # stored with the first axis fastest, so this copies nothing
    facts.digest = digest.hexdigest()


def _look_prepared(facts: dict[str, _VolumeFacts], is_m3d: bool) -> bool:
    """
    Whether more than half of the volumes are stored as floating-point numbers, in one shape, and in [0, 1]; where values were
    not read, whether we prepared them, or they lie in the layout of M3D. Folders of slices never are: their stacks merely come
    as such numbers.
    """
    shapes = Counter(
        found.shape
        for found in facts.values()
        if found.shape is not None
        and found.is_float
        and not found.is_folder
        and (
            is_m3d or found.has_record
            if found.value_range is None
            else 0 <= found.value_range[0] <= found.value_range[1] <= 1
        )
    )
    return len(facts) > 1 and bool(shapes) and shapes.most_common(1)[0][1] > len(facts) / 2


def _group_of(image: str) -> str:
    """What volumes of one shape have in common: those of a cache lie in one folder for each setting of the processor."""
    return str(Path(image).parents[1]) if image.endswith(CACHE_ENDING) else ""


def _expected_shapes(facts: dict[str, _VolumeFacts], shape: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """For each group of volumes `shape`, or the most frequent one."""
    shapes: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for image, found in facts.items():
        shapes[_group_of(image)].update([] if found.shape is None else [found.shape])
    return {group: shape or (found.most_common(1)[0][0] if found else ()) for group, found in shapes.items()}


def _prepared_problems(found: _VolumeFacts, shape: tuple[int, ...]) -> list[tuple[Severity, str, str]]:
    problems: list[tuple[Severity, str, str]] = []
    if found.shape is None:
        return problems
    if found.shape != shape:
        problems.append(("error", "wrong_shape", f"expected (depth, height, width) = {shape}, got {found.shape}"))
    if not found.is_float:
        problems.append(("error", "not_float", "expected floating-point numbers in [0, 1], got integers"))
    if found.value_range is not None and np.isfinite(found.value_range).all():
        low, high = found.value_range
        if low < 0 or high > 1:
            problems.append(("error", "outside_unit_range", f"expected values in [0, 1], got {low:g} to {high:g}"))
    return problems


def _mixed_intensities(facts: dict[str, _VolumeFacts], first_rows: dict[str, _Row]) -> list[Problem]:
    """The scans, the smaller part of a study, that `intensity_mode` "auto" would scale in another way than the others."""
    ranges = {image: found.value_range for image, found in facts.items() if found.value_range is not None}
    as_ct = {image for image in ranges if facts[image].is_ct}
    others = set(ranges) - as_ct
    if not as_ct or not others:
        return []
    few, is_ct = (as_ct, True) if len(as_ct) < len(others) else (others, False)
    advice = "ask for one `intensity_mode`" if is_ct else "if it is CT, its values have an offset: subtract it"
    return [
        Problem(
            "warning",
            "mixed_intensities",
            image,
            first_rows[image].row if image in first_rows else None,
            f"values from {ranges[image][0]:g} to {ranges[image][1]:g}: {'windowed as CT' if is_ct else 'scaled by their own range'}, "
            f"unlike {len(ranges) - len(few)} other scans; {advice}",
        )
        for image in ranges
        if image in few
    ]


def _overlaps(rows: list[_Row], facts: dict[str, _VolumeFacts], first_rows: dict[str, _Row]) -> list[Problem]:
    """What stands in two splits, and voxels that stand in two files."""
    problems = _shared_by_splits(rows, "image", "volume_in_two_splits", "the same volume file")
    # A file in two splits is listed already; here only other files of the case count.
    problems += _shared_by_splits(rows, "case", "case_in_two_splits", "another volume of the same case")
    splits: dict[str, set[str]] = defaultdict(set)
    reports: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.image].add(row.split)
        if row.task == "report" and row.answer and row.split:
            reports[_plain(row.answer)].add(row.split)
    same_voxels: dict[str, list[str]] = defaultdict(list)
    for image, found in facts.items():
        if found.digest:
            same_voxels[found.digest].append(image)
    for first, *others in same_voxels.values():
        for image in others:
            shared = _both(splits[first], splits[image])
            severity: Severity = "error" if shared else "warning"
            kind = "same_voxels_in_two_splits" if shared else "same_voxels"
            row = first_rows[image]
            reason = f"the same voxels as {first}" + (f", in the splits {shared}" if shared else "")
            problems.append(Problem(severity, kind, image, row.row or None, reason))
    shared_reports = sum(len(names) > 1 for names in reports.values())
    if shared_reports:
        file = next(row.file for row in rows if row.task == "report")
        reason = f"{shared_reports} of {len(reports)} different reports stand in more than one split"
        problems.append(Problem("info", "same_report_in_two_splits", file, None, reason))
    return problems


def _both(first: set[str], second: set[str]) -> str:
    """The names of two splits when two files are not in the same one, else nothing."""
    together = sorted((first | second) - {""})
    return " and ".join(together) if len(together) > 1 and first != second else ""


def _shared_by_splits(rows: list[_Row], attribute: str, kind: str, what: str) -> list[Problem]:
    """A problem for each volume file or case that stands in a split other than that of its first row."""
    seen: dict[str, tuple[_Row, set[str]]] = {}
    problems = []
    for row in rows:
        if not row.split:
            continue
        name = getattr(row, attribute)
        first, splits = seen.setdefault(name, (row, {row.split}))
        # One problem for each further split; for a case only where another file brings it there.
        if row.split in splits or (attribute == "case" and row.image == first.image):
            continue
        splits.add(row.split)
        place = f"{Path(first.file).name}, row {first.row}"
        reason = f"{what} is in the split {row.split} here and in {first.split} in {place}"
        problems.append(Problem("error", kind, row.file, row.row, reason))
    return problems


def _count_samples(rows: list[_Row]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        tasks = counts.setdefault(row.split, {})
        tasks[row.task] = tasks.get(row.task, 0) + 1
    return counts


def _count_shapes(facts: dict[str, _VolumeFacts]) -> dict[str, int]:
    shapes = Counter("x".join(map(str, found.shape)) for found in facts.values() if found.shape is not None)
    return dict(shapes.most_common())


__all__ = ["CheckReport", "Problem", "check_study", "format_check_report"]
