"""
Preparation of M3D-Cap, `med3dvlm prepare m3d-cap SRC DST`: case folders of slices or scans to volumes of one size.

The numeric steps are the original's (Xin et al. 2025), taken by the one image processor: intensity to [0, 1], crop to the
foreground, trilinear resize. Each series becomes `DST/<case>/<series>.nii.gz`, its report a text of one line beside it,
under the names the original gives them.

What is written, and what it means:

- Voxels are float32, axes growing to the left, to posterior and to superior. Read with `intensity_mode="none"` and
  `do_crop_foreground=False`, a file gives the model's array to the bit.
- The affine of a series of scans is that of the scan, after orientation, crop and resize, in mm (`xyzt_units` 2, codes 1).
- Slices are pictures, whose distances no one knows. Their affine counts in pixels of the stack of slices (`xyzt_units` 0:
  unknown; codes 2: aligned with something else, here the stack): it tells crop and scale, and its directions are those the
  original writes for every series, whatever its plane. A scan whose header does not say how the patient lies has codes 2,
  too.
- A header extension (code 6, a comment) in JSON keeps settings, state of the source, the processor's report, and the files
  of the series that were left out. By it a second call knows what is done.
"""

import csv
import errno
import gzip
import io
import json
import re
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import nibabel
import numpy as np
import torch
from transformers.utils import logging

from ...processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from ...processing.volume_io import InvalidVolumeError, Volume, open_volume
from ..files import find_surrogate, only_one_at, write_atomically
from ..naming import name_a_few
from ..processes import count_usable_cores, worker_pool
from .cache import describe_source, fingerprint_of
from .layout import CAP_INDEX, VQA_FOLDER
from .preparation_record import COMMENT, MADE_BY, read_preparation_record
from .samples import SPLITS, Split
from .slices import (
    SLICE_ENDINGS,
    DroppedSlice,
    describe_misnaming,
    describe_missing,
    describe_repeated,
    find_cases,
    find_report,
    find_rival_texts,
    find_series,
    folders_without_series,
    is_damage,
    is_misnaming,
    is_nifti_file,
    missing_numbers,
    read_report,
    read_slices,
    remedy_for_endings,
    repeated_numbers,
    to_ascii,
    visible_entries,
)
from .splits import check_cases_are_named, check_index_may_be_written, check_splits, describe_splits, draw_splits


logger = logging.get_logger(__name__)

Level = Literal["case", "series", "sample", "slice", "file"]
LEVELS: tuple[Level, ...] = get_args(Level)

CAP_FOLDER = Path(CAP_INDEX).parent.name
REPORT_NAME = "preparation_report"
# How the reason begins for a case that gave no volume.
NO_SERIES, NO_VOLUME = "there is no series", "none of its series could be prepared"
DEFAULT_HU_RANGE = (-1000.0, 1000.0)
# Axes (width, height, depth) that grow to the left, to posterior and to superior, in steps of one pixel.
STACK_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
# Names under which `write_atomically` begins a file.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
NOT_UTF_8 = "its name is not UTF-8: rename it"
SCANNER, ALIGNED = 1, 2  # NIfTI's codes for what an affine leads to
# Errors of writing that meet every case, and what to do. Others, as of a name that a disk cannot hold, are of one case.
_MAKE_ROOM, _ALLOW = "Free some space, or choose another folder", "Choose a folder that may be written to, or allow it"
REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EROFS: _ALLOW,
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EIO: "Look after the disk, or choose another folder",
}


@dataclass(frozen=True)
class Dropped:
    """
    Something that was left out.

    Attributes:
        level (`str`):
            `"case"`: no sample came of the case; `"series"`: no volume of the series; `"sample"`: a volume stands in no
            split of the given index; `"slice"`: a picture is not in its volume; `"file"`: a file of another kind.
        case (`str`):
            Folder of the case, relative to the source.
        series (`str`):
            Name of the series; empty for a case, and for a file that lies in none.
        name (`str`):
            Name of the slice or file, else empty.
        reason (`str`):
            Why, and what to do. It quotes no text of a report.
    """

    level: Level
    case: str
    series: str
    name: str
    reason: str

    @property
    def is_failure(self) -> bool:
        """Whether it was to be prepared and could not be: a case, a series, a damaged or misnamed slice."""
        return self.level in ("case", "series") or (self.level == "slice" and is_damage(self.reason))


class CannotWriteError(OSError):
    """A file of the result cannot be written."""


@dataclass
class PreparationReport:
    """
    What [`prepare_m3d_cap`] did.

    Attributes:
        source, destination (`str`):
            The two folders.
        root (`str`):
            Folder from which `read_m3d_cap` reads the result.
        index (`str`):
            The file `M3D_Cap.json`.
        num_cases (`int`):
            Cases that were found.
        num_volumes (`int`):
            Volumes that are there now.
        num_made (`int`):
            Those made by this call; the others were done before.
        num_samples (`dict[str, int]`):
            Entries of the index by split.
        splits (`dict[str, Any]`):
            What decided about them: `fractions` and `seed`, or `index`, a digest of the given one.
        warnings (`list[str]`):
            What may be wrong with volumes that were made, such as two slices with one number, and volumes of an earlier call
            that were replaced or are in no split any more.
        dropped (`list[Dropped]`):
            All that was left out, cases first.
    """

    source: str
    destination: str
    root: str
    index: str
    num_cases: int = 0
    num_volumes: int = 0
    num_made: int = 0
    num_samples: dict[str, int] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def count(self, level: Level) -> int:
        """How many things of a level were left out; a case counts once, whatever it lacks."""
        if level == "case":
            return len({entry.case for entry in self.dropped if entry.level == level})
        return sum(entry.level == level for entry in self.dropped)

    @property
    def is_ok(self) -> bool:
        """
        Whether every case gave a sample, every series a volume, and no slice is damaged or misnamed. Anything else that was
        left out was left out on purpose.
        """
        return not any(entry.is_failure for entry in self.dropped)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it, with the numbers of what was left out in front of the list."""
        content = asdict(self)
        rows = content.pop("dropped")
        counts = {level: self.count(level) for level in LEVELS}
        return {**content, "is_ok": self.is_ok, "num_dropped": counts, "dropped": rows}


@dataclass(frozen=True)
class _Settings:
    """All that a process needs to prepare a case."""

    source: Path
    destination: Path
    image_size: tuple[int, ...]
    intensity_mode: str
    hu_range: str | tuple[float, ...]
    accept_jpg: bool

    def image_processor(self) -> Med3DVLMImageProcessor:
        return Med3DVLMImageProcessor(
            image_size=list(self.image_size),
            intensity_mode=self.intensity_mode,
            hu_range=self.hu_range if isinstance(self.hu_range, str) else list(self.hu_range),
        )


@dataclass
class _CaseResult:
    """What became of a case: file names in its folder, and what was left out."""

    case: str
    report: str | None = None
    volumes: list[str] = field(default_factory=list)
    num_made: int = 0
    replaced: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def drop(self, level: Level, reason: str, series: str = "", name: str = "") -> None:
        self.dropped.append(Dropped(level, self.case, series, name, reason))

    def drop_from_series(self, series: str, dropped: Sequence[DroppedSlice]) -> None:
        for name, reason in dropped:
            self.drop("slice" if name.lower().endswith((*SLICE_ENDINGS, ".jpg")) else "file", reason, series, name)


def prepare_m3d_cap(
    source: str | Path,
    destination: str | Path,
    image_size: Sequence[int] = (128, 256, 256),
    num_workers: int | None = None,
    progress: bool = False,
    splits: Mapping[str, float] | str | Path | None = None,
    seed: int = 0,
    intensity_mode: str = "auto",
    hu_range: str | Sequence[float] = DEFAULT_HU_RANGE,
    accept_jpg: bool = False,
) -> PreparationReport:
    """
    Prepares the case folders of M3D-Cap, `SRC/<case>/<series>/<number>.png`, or of NIfTI scans, `SRC/<case>/<series>.nii.gz`,
    with the report in `SRC/<case>/*.txt`. Case folders may lie deeper, as in `SRC/ct_case/000006`.

    A volume that was made with the same settings of a source that has not changed is left as it is, so a call that was
    interrupted or killed is continued by the same call. Every file appears whole or not at all. A case that fails does not
    stop the others: all that was left out is listed, with the reason, in `preparation_report.json` and
    `preparation_report.csv`.

    The index `M3D_Cap.json` is written so that `read_m3d_cap(report.root, split)` reads the result: `root` is the parent of
    a `destination` that is called `M3D_Cap_npy`, as M3D calls it; for any other name it is `destination` itself, in which a
    folder `M3D_Cap_npy` then holds the index alone.

    Args:
        source (`str` or `Path`):
            Folder of the case folders. It is not changed.
        destination (`str` or `Path`):
            Folder for the volumes; not within `source`.
        image_size (`Sequence[int]`, *optional*, defaults to `(128, 256, 256)`):
            Voxels along (depth, height, width).
        num_workers (`int`, *optional*):
            Processes; one for each core by default, 0 for none beside this one.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar of the cases.
        splits (`Mapping` or path, *optional*):
            Fractions of the cases, `{"validation": 0.05, "test": 0.05}` by default, the rest being for training; or an
            existing index of the form of `M3D_Cap.json`, whose splits are taken, in its order. A case is in one split by
            fractions. Later calls take the same; to split anew, delete the index that was written.
        seed (`int`, *optional*, defaults to 0):
            Seed of the splits by fractions. The split of a case depends on its name, the seed and the fractions alone, so cases
            that come later move none; only where a split would stay empty, as with few cases, one is moved into it.
        intensity_mode (`str`, *optional*, defaults to `"auto"`), hu_range (`str` or `Sequence[float]`, *optional*):
            As in [`Med3DVLMImageProcessor`], for scans. Slices are scaled by their own range, `"minmax"`.
        accept_jpg (`bool`, *optional*, defaults to `False`):
            Whether to take `.jpg` slices, which the original leaves out.

    Returns:
        [`PreparationReport`].

    Raises:
        FileNotFoundError: there is no folder `source`, or no index `splits`.
        ValueError: an option has a value that cannot be, `source` holds no case, or none that the index `splits` names, or
            `destination` lies within it.
        BlockingIOError: another call is working on `destination`.
        FileExistsError: `destination` holds an index that preparation has not made, or has made with other `splits` or
            another `seed`, or by an earlier version, which drew splits otherwise, or of another source with cases that this
            one does not have; or `splits` is the index that is about to be written.
        CannotWriteError: a file cannot be written, for instance because the disk is full. Nothing more is tried.

    Example:

    ```python
    >>> from med3dvlm.train.data.m3d import read_m3d_cap
    >>> from med3dvlm.train.data.prepare import format_preparation_report, prepare_m3d_cap

    >>> report = prepare_m3d_cap("M3D_Cap", "data/M3D_Cap_npy")  # doctest: +SKIP
    >>> print(format_preparation_report(report))  # doctest: +SKIP
    >>> dataset = read_m3d_cap(report.root, "train")  # doctest: +SKIP
    ```"""
    source, destination = Path(source).absolute(), Path(destination).absolute()
    settings = _Settings(
        source,
        destination,
        tuple(image_size),
        intensity_mode,
        hu_range if isinstance(hu_range, str) else tuple(hu_range),
        accept_jpg,
    )
    settings.image_processor()  # refuses bad options before anything is done
    if num_workers is None:
        num_workers = count_usable_cores()
    if num_workers < 0:
        raise ValueError(f"`num_workers` must be 0 or more, got {num_workers}.")
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: there is no such folder. Expected one of case folders, as M3D-Cap has them."
        )
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{destination}: expected a folder outside {source}, so that what is written is not taken for a case."
        )
    fractions, given = check_splits(splits)
    chosen = describe_splits(fractions, given, seed)
    cases = find_cases(source, accept_jpg)
    if not cases:
        raise ValueError(
            f"{source} holds no case folders. Expected SRC/<case>/<series>/<number>.png, or SRC/<case>/<series>.nii.gz, "
            "with a text file for each case; name the folder above the cases."
        )

    unnamed = check_cases_are_named(splits, given, source, cases) if given is not None else []
    root = destination.parent if destination.name == CAP_FOLDER else destination
    prefix = destination.relative_to(root)
    folders = [(prefix / case).as_posix() for case in cases]
    former = check_index_may_be_written(
        root / CAP_INDEX, destination / f"{REPORT_NAME}.json", splits, chosen, source, folders
    )
    if unnamed:
        logger.warning(
            f"{len(unnamed)} of the {len(cases)} cases in {source} are not named by {splits}, so that their volumes will be in no "
            f"split: {name_a_few(unnamed)}."
        )
    if splits is None and (root / VQA_FOLDER).is_dir():
        logger.warning(
            f"{root / VQA_FOLDER}: its questions follow the splits of M3D-Cap's own index, and with splits that are drawn here "
            "volumes will be in two of them. Pass that M3D_Cap.json as `splits` (--splits)."
        )
    index_folder = (root / CAP_INDEX).parent
    for folder in (destination, index_folder):
        make_folder_or_stop(folder)
    with _only_one_at(destination):
        for folder in (destination, index_folder):
            _remove_leftovers(folder)
        rivals = find_rival_texts(source, cases, accept_jpg)
        unusable = {**rivals, **{case: NOT_UTF_8 for case in cases if find_surrogate(case)}}
        results = _prepare_cases([case for case in cases if case not in unusable], settings, num_workers, progress)
        report = PreparationReport(str(source), str(destination), str(root), str(root / CAP_INDEX), len(cases))
        report.splits = chosen
        report.dropped += [Dropped("case", case, "", "", reason) for case, reason in unusable.items()]
        report.dropped += _list_stray_texts(source, cases, rivals)
        for result in results:
            report.num_volumes += len(result.volumes)
            report.num_made += result.num_made
            report.warnings += result.warnings
            report.dropped += result.dropped
        index, dropped = _make_index(results, prefix, fractions, given, seed)
        report.warnings += _compare_with_former(
            former, index, [name for result in results for name in result.replaced]
        )
        repeated = [key for key, count in Counter(key for key, _ in given or ()).items() if count > 1]
        if repeated:
            report.warnings.append(
                f"{splits}: {len(repeated)} volumes are in two splits, such as {repeated[0]}: scores on one are not of volumes "
                "that training on the other has not seen"
            )
        report.num_samples = {split: len(entries) for split, entries in index.items()}
        report.dropped = sorted(report.dropped + dropped, key=_order)
        _write_report(report, destination)  # first: an index without it would be taken for one of something else
        write_or_stop((json.dumps(index, ensure_ascii=False, indent=1) + "\n").encode(), root / CAP_INDEX)
    return report


def encode_prepared_volume(
    volume: torch.Tensor, affine: np.ndarray, is_in_mm: bool, is_orientation_known: bool, record: Mapping[str, Any]
) -> bytes:
    """
    A compressed NIfTI file of a prepared volume.

    Args:
        volume (`torch.Tensor` of shape `(depth, height, width)`):
            In [0, 1], float32.
        affine (`np.ndarray` of shape `(4, 4)`):
            Maps `(d, h, w, 1)` to RAS+, as the processor's report has it.
        is_in_mm (`bool`), is_orientation_known (`bool`):
            What the affine counts, and whether it leads to the patient or to a stack of slices.
        record (`Mapping`):
            For the header extension.

    Raises:
        InvalidVolumeError: the axes lie halfway between the patient's directions, so that a reader could swap them.
    """
    stored = affine[:, [2, 1, 0, 3]].astype(np.float32)  # (D, H, W) -> (W, H, D), as the header keeps it
    if nibabel.aff2axcodes(stored) != ("L", "P", "S"):
        raise InvalidVolumeError(
            "the axes of the scan lie halfway between the directions of the patient. Resample it to axes that are closer "
            "to them."
        )
    image = nibabel.Nifti1Image(volume.numpy().transpose(2, 1, 0), stored, dtype=np.float32)
    code = SCANNER if is_in_mm and is_orientation_known else ALIGNED
    image.header.set_sform(stored, code)
    image.header.set_qform(stored, code)
    if not np.allclose(image.header.get_qform(), stored, atol=1e-3):
        image.header["qform_code"] = 0  # a quaternion cannot express axes that are not at right angles
    image.header.set_xyzt_units(xyz="mm" if is_in_mm else "unknown")
    image.header["descrip"] = b"M3D-Cap, prepared by med3dvlm"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(COMMENT, json.dumps(record).encode()))
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)  # the same volume gives the same file


def format_preparation_report(report: PreparationReport) -> str:
    """
    The report as a table for a reader, with the reasons for what was left out. Those of series come first; that a case is left
    without one is told where nothing is told of its series.
    """
    rows = {
        "cases": f"{report.num_cases}",
        "volumes": f"{report.num_volumes}, {report.num_made} made now, {report.num_volumes - report.num_made} before",
        "samples": ", ".join(f"{count} {split}" for split, count in report.num_samples.items()),
    }
    if any(report.num_samples.values()):
        rows["read them with"] = f'read_m3d_cap("{report.root}", "train")'
    rows |= {f"dropped, {level}": str(report.count(level)) for level in LEVELS}
    rows["listed in"] = str(Path(report.destination) / f"{REPORT_NAME}.csv")
    width = max(map(len, rows))
    lines = [f"{label:<{width}}  {value}" for label, value in rows.items()]
    left_out: list[str] = []
    damaged: list[str] = []
    misnamed: list[str] = []
    told = {entry.case for entry in report.dropped if entry.level == "series" and entry.is_failure}
    for entry in sorted(report.dropped, key=lambda entry: entry.level == "case"):
        if entry.is_failure and not (entry.reason.startswith((NO_SERIES, NO_VOLUME)) and entry.case in told):
            place = "/".join(filter(None, (entry.case, entry.series, entry.name)))
            of_slices = misnamed if is_misnaming(entry.reason) else damaged
            (of_slices if entry.level == "slice" else left_out).append(f"{place}: {entry.reason}")
    for title, entries in (
        ("Cases and series that were left out", left_out),
        ("Volumes that lack damaged slices: copy these again, or delete them", damaged),
        ("Volumes that lack misnamed slices: rename these, or delete them", misnamed),
        ("Warnings", report.warnings),
    ):
        if entries:
            lines += ["", f"{title} ({len(entries)}):", *(f"  {entry}" for entry in entries[:10])]
            lines += [f"  ... and {len(entries) - 10} more"] if len(entries) > 10 else []
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # a name that is not UTF-8 cannot be printed


def _prepare_cases(cases: list[str], settings: _Settings, num_workers: int, progress: bool) -> list[_CaseResult]:
    from tqdm import tqdm

    results = {}
    num_failed = 0
    with tqdm(desc="cases", total=len(cases), unit="case", disable=not progress) as bar:
        for result in _run(cases, settings, num_workers):
            results[result.case] = result
            num_failed += any(entry.is_failure for entry in result.dropped)
            bar.set_postfix(with_failures=num_failed, refresh=False)
            bar.update()
    return [results[case] for case in cases]


def _run(cases: list[str], settings: _Settings, num_workers: int) -> Iterator[_CaseResult]:
    """Results in any order. A case whose process dies takes no other case along."""
    if num_workers == 0:
        yield from (_prepare_case(case, settings) for case in cases)
        return
    waiting = deque(cases)
    while waiting:
        suspects: list[str] = []
        with _workers(min(num_workers, len(waiting))) as pool:
            running: dict[Future[_CaseResult], str] = {}
            while (waiting or running) and not suspects:
                # Few at a time: a hundred thousand waiting tasks are slow to cancel, and all are suspect if a process dies.
                while waiting and len(running) < 2 * num_workers:
                    case = waiting.popleft()
                    try:
                        running[pool.submit(_prepare_case, case, settings)] = case
                    except BrokenProcessPool:
                        suspects.append(case)
                        break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    case = running.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        suspects.append(case)
            suspects += running.values()
        yield from _run_alone(suspects, settings)


def _run_alone(suspects: list[str], settings: _Settings) -> Iterator[_CaseResult]:
    """Results of cases one of which ended its process: one at a time, it shows which."""
    waiting = deque(suspects)
    while waiting:
        with _workers(1) as pool:
            while waiting:
                case = waiting.popleft()
                try:
                    yield pool.submit(_prepare_case, case, settings).result()
                except BrokenProcessPool:
                    result = _CaseResult(case)
                    result.drop("case", "its process was ended from outside, as happens when memory runs out")
                    yield result
                    break


def _workers(num_workers: int) -> AbstractContextManager[ProcessPoolExecutor]:
    # One thread of torch in each: the other processes take the other cores.
    return worker_pool(num_workers, partial(torch.set_num_threads, 1), preload=__name__)


def _prepare_case(case: str, settings: _Settings) -> _CaseResult:
    result = _CaseResult(case)
    folder, output = settings.source / case, settings.destination / case
    try:
        make_folder_or_stop(output)
        _remove_leftovers(output)
        _prepare_report(folder, output, result)
        series = find_series(folder, settings.accept_jpg)
        _list_what_is_no_series(folder, series, result)
        for path, name in _name_series(folder, series, result):
            try:
                _prepare_series(path, name, output, settings, result)
            except CannotWriteError:
                raise
            except Exception as error:  # whatever it is, it is listed, and the other series are prepared
                result.drop("series", _reason(error, path), path.name)
    except CannotWriteError:
        raise  # it would meet every other case too
    except Exception as error:
        result.drop("case", _reason(error, folder))
        return result
    if not result.volumes:
        expected = "expected folders of .png or .jpeg slices, or NIfTI files"
        result.drop("case", NO_VOLUME if series else f"{NO_SERIES}: {expected}")
    return result


def _remove_leftovers(folder: Path) -> None:
    """Deletes what a call that was killed had begun to write."""
    with _or_stop(folder):
        for path in folder.glob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()


def _list_stray_texts(source: Path, cases: Sequence[str], rivals: Collection[str]) -> list[Dropped]:
    """The texts in folders above the cases, but for those that could be the report of one, which its failure names."""
    folders = {folder.as_posix() for case in cases for folder in PurePosixPath(case).parents if folder.name}
    folders -= {PurePosixPath(case).parent.as_posix() for case in rivals}
    return [
        Dropped("file", folder, "", path.name, "a text above cases, so the report of none: move it away")
        for folder in sorted(folders)
        for path in visible_entries(source / folder)
        if path.name.endswith(".txt")
    ]


def _prepare_report(folder: Path, output: Path, result: _CaseResult) -> None:
    try:
        path, text = find_report(folder), read_report(folder)
    except (FileNotFoundError, ValueError) as error:
        result.drop("case", _reason(error, folder))
        return
    if find_surrogate(path.name):
        result.drop("case", f"the report {path.name}: {NOT_UTF_8}")
        return
    if not text:
        result.drop("case", f"the report is empty: fill in {path.name}")
        return
    content = text.encode()
    target = output / path.name
    if not target.is_file() or target.read_bytes() != content:
        write_or_stop(content, target)
    result.report = path.name


def _list_what_is_no_series(folder: Path, series: list[Path], result: _CaseResult) -> None:
    unused = folders_without_series(folder, series)
    for path in visible_entries(folder):
        if path in series or path.name.endswith(".txt"):
            continue
        if not path.is_dir():
            hint = ": slices belong in a folder for each series" if path.name.endswith(SLICE_ENDINGS) else ""
            result.drop("file", f"neither a report (.txt) nor a NIfTI file{hint}", name=path.name)
        elif path in unused:
            entries = visible_entries(path)
            names = [entry.name for entry in entries]
            found = f"got {name_a_few(names)}" if names else "it is empty"
            remedy = remedy_for_endings({entry.suffix for entry in entries})
            result.drop("series", f"expected .png or .jpeg slices, {found}{remedy and f': {remedy}'}", path.name)


def _name_series(folder: Path, series: list[Path], result: _CaseResult) -> Iterator[tuple[Path, str]]:
    """Each series with the name of its file; those whose name is taken are left out."""
    taken: dict[str, str] = {}
    for path in series:
        place = path.relative_to(folder).as_posix()
        if find_surrogate(place):
            result.drop("series", NOT_UTF_8, place)
            continue
        name = place.replace("/", "_")
        if is_nifti_file(path):
            name = name[: -len(".nii.gz")] if name.lower().endswith(".gz") else name[: -len(".nii")]
        name = f"{to_ascii(name)}.nii.gz"
        key = name.lower()  # some file systems take capitals for small letters
        if key in taken:
            reason = f"its file would be {name}, which is that of {taken[key]}: rename one of them"
            result.drop("series", reason, path.name)
        else:
            taken[key] = path.name
            yield path, name


def _prepare_series(path: Path, name: str, output: Path, settings: _Settings, result: _CaseResult) -> None:
    is_stack = path.is_dir()
    if not is_stack and read_preparation_record(path) is not None:
        raise InvalidVolumeError(
            f"{path}: written by `{MADE_BY}`, so it is cropped and scaled already, and must not be once more: prepare from the "
            "scans, or train with another image_size, which resizes."
        )
    image_processor = settings.image_processor()
    options: dict[str, Any] = {"intensity_mode": "minmax"} if is_stack else {}
    # Options that make no difference to this series have their defaults in the fingerprint, so that it is not made anew.
    has_jpg = is_stack and any(entry.name.lower().endswith(".jpg") for entry in path.iterdir())
    described = {**options, "accept_jpg": settings.accept_jpg and has_jpg}
    if options.get("intensity_mode", settings.intensity_mode) not in ("auto", "window"):
        described["hu_range"] = list(DEFAULT_HU_RANGE)
    fingerprint = fingerprint_of(image_processor, "float32", described)
    accepted = {fingerprint}
    if not has_jpg:  # earlier versions had the option in the fingerprint of every series
        accepted.add(fingerprint_of(image_processor, "float32", {**described, "accept_jpg": True}))
    state = describe_source(path)
    record = read_preparation_record(output / name)
    if record is None and is_readable_volume(output / name):
        raise FileExistsError(
            f"{output / name} exists, and preparation has not made it, so it is not replaced: move it away"
        )
    is_replaced = record is not None and record.get("source") != state
    if (
        record is None
        or is_replaced
        or record.get("settings") not in accepted
        or (is_stack and _has_untold_misnaming(path, record, settings.accept_jpg))
    ):
        scan: Any = open_volume(path) if not is_stack else None
        is_orientation_known = not is_stack and scan.is_orientation_known
        dropped: list[DroppedSlice] = []
        if is_stack:
            stack, dropped = read_slices(path, settings.accept_jpg)
            stored = stack.transpose(2, 1, 0)  # (D, H, W) -> (W, H, D)
            scan = Volume(str(path), stored, stored.shape, stored.dtype, STACK_AFFINE, is_orientation_known=True)
        inputs = image_processor(scan, return_report=True, **options)
        report = inputs["preprocessing_report"][0]
        report.pop("source")  # a path may name a patient
        record = {
            "made_by": MADE_BY,
            "settings": fingerprint,
            "source": state,
            "preprocessing_report": report,
            "dropped": dropped,
            "repeated": repeated_numbers(path, dropped) if is_stack else [],
        }
        content = encode_prepared_volume(
            inputs["pixel_values"][0, 0], np.array(report["affine"]), not is_stack, is_orientation_known, record
        )
        write_or_stop(content, output / name)
        result.num_made += 1
        if is_replaced:
            result.replaced.append(f"{result.case}/{name}")
    result.volumes.append(name)
    if record.get("repeated"):  # earlier versions kept no note of it
        result.warnings.append(f"{result.case}/{path.name}: {describe_repeated(record['repeated'])}")
    if is_stack and (gaps := missing_numbers(path)):
        result.warnings.append(f"{result.case}/{path.name}: {describe_missing(gaps)}")
    result.drop_from_series(path.name, [(file, reason) for file, reason in record["dropped"]])


def _has_untold_misnaming(folder: Path, record: Mapping[str, Any], accept_jpg: bool) -> bool:
    """Whether slices are misnamed that an earlier version stacked, or left out without calling that a failure."""
    told = {name for name, reason in record["dropped"] if is_damage(reason)}
    return any(
        path.name not in told and describe_misnaming(path, accept_jpg) and not path.is_dir()
        for path in folder.iterdir()
    )


def is_readable_volume(path: Path) -> bool:
    """Whether there is a NIfTI file that can be opened, whoever made it."""
    try:
        open_volume(path)
    except (FileNotFoundError, ValueError):
        return False
    return True


def write_or_stop(content: bytes, path: Path) -> None:
    """
    Raises:
        CannotWriteError: the file cannot be written, and no other either. Unlike a fault of a case, this ends the
            preparation.
        OSError: it alone cannot be written.
    """
    with _or_stop(path):
        write_atomically(content, path)


def make_folder_or_stop(path: Path) -> None:
    """
    Raises:
        CannotWriteError: the folder cannot be made, and no other either.
        OSError: it alone cannot be made, for instance because a file stands in its place.
    """
    with _or_stop(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _or_stop(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise  # of this place alone; another case can be written
        raise CannotWriteError(
            f"{path}: it cannot be written ({error.strerror}). {remedy}; the same call then goes on."
        ) from error


def _reason(error: Exception, path: Path) -> str:
    """An error's message without the path, which stands beside it; of faults, the kind too."""
    message = str(error).removeprefix(f"{path}: ")
    expected = isinstance(error, (OSError, ValueError)) and message
    return message if expected else f"{type(error).__name__}: {message}"


def _only_one_at(destination: Path) -> AbstractContextManager[None]:
    """Keeps a second call away, which would take files that are being written for leftovers."""
    return only_one_at(
        destination / f".{REPORT_NAME}.lock",
        f"{destination}: another call is preparing this folder. Wait for it, or choose another folder.",
    )


def _make_index(
    results: list[_CaseResult],
    prefix: Path,
    fractions: Mapping[str, float],
    given: Sequence[tuple[str, Split]] | None,
    seed: int,
) -> tuple[dict[str, list[dict[str, str]]], list[Dropped]]:
    index: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    dropped: list[Dropped] = []
    usable = [result for result in results if result.report is not None and result.volumes]
    made: dict[str, dict[str, str]] = {}
    named = {key for key, _ in given or ()}
    for result in usable:
        for name in result.volumes:
            if given is not None and f"{result.case}/{name}" not in named:
                reason = "the given index does not name it, so it is in no split"
                dropped.append(Dropped("sample", result.case, name, "", reason))
                continue
            folder = prefix / result.case
            entry = {"image": (folder / name).as_posix(), "text": (folder / str(result.report)).as_posix()}
            made[f"{result.case}/{name}"] = entry
    if given is None:
        drawn = draw_splits([result.case for result in usable], fractions, seed)
        given = [(key, drawn[key.rpartition("/")[0]]) for key in made]
    for key, split in given:  # in its order: protocols take the first samples of a split
        if key in made:
            index[split].append(made[key])
    for key in sorted(named - set(made)):
        case, _, name = key.rpartition("/")
        reason = "the given index names it, and no volume with a report was made of the source"
        dropped.append(Dropped("series", case, name, "", reason))
    return index, dropped


def _compare_with_former(
    former: Collection[str], index: Mapping[str, Sequence[Mapping[str, str]]], replaced: Sequence[str]
) -> list[str]:
    """What became of the volumes that an earlier call made, as warnings: those that left the index, and those made anew."""
    gone = sorted(set(former) - {entry["image"] for entries in index.values() for entry in entries})
    warnings = []
    if gone:
        warnings.append(
            f"{len(gone)} volumes of the former index left it ({name_a_few(gone, 3)}): see whether the source is complete"
        )
    if replaced:
        warnings.append(
            f"{len(replaced)} volumes were replaced because their source changed ({name_a_few(replaced, 3)})"
        )
    return warnings


def _order(entry: Dropped) -> tuple[int, str, str, str]:
    return LEVELS.index(entry.level), entry.case, entry.series, entry.name


def _write_report(report: PreparationReport, destination: Path) -> None:
    content = json.dumps(report.to_dict(), ensure_ascii=False, indent=1) + "\n"
    # A name that is not UTF-8 becomes "\udcfc", which JSON reads as that name again.
    write_or_stop(content.encode(errors="backslashreplace"), destination / f"{REPORT_NAME}.json")
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("level", "case", "series", "name", "reason"))
    writer.writerows((entry.level, entry.case, entry.series, entry.name, entry.reason) for entry in report.dropped)
    write_or_stop(table.getvalue().encode(errors="backslashreplace"), destination / f"{REPORT_NAME}.csv")


__all__ = [
    "Dropped",
    "PreparationReport",
    "encode_prepared_volume",
    "format_preparation_report",
    "prepare_m3d_cap",
]
