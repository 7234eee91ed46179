"""
Readers of M3D-Cap and M3D-VQA, in the files' original layouts.

The data are M3D's (Bai et al. 2024, "M3D: Advancing 3D Medical Image Analysis with Multi-Modal Large Language Models"),
the prepared layout is that of Med3DVLM (Xin et al. 2025), whose preparation writes each series as NIfTI:

- `ROOT/M3D_Cap_npy/M3D_Cap.json`: `{"train": [{"image": path, "text": path}, ...], "validation": [...], "test": [...]}`,
  with paths relative to `ROOT`, such as `M3D_Cap_npy/ct_case/000006/Axial_non_contrast.nii.gz` and
  `M3D_Cap_npy/ct_case/000006/text.txt`. The folder is called `_npy` whatever it holds.
- `ROOT/M3D-VQA/M3D_VQA_{train,val,test}.csv` and `M3D_VQA_yn_train.csv`, with the columns `Image Path`, `Text`,
  `Question Type`, `Question`, `Choice A` to `Choice D`, `Answer`, `Answer Choice`; paths relative to `ROOT`.
- A path that ends in `.npy`, as some published files have it, means the `.nii.gz` file of that name.

A reader refuses what it cannot read (missing files and columns, unknown splits, letters and question types) and texts
that would train on nothing (empty reports, questions, answers). Whether the volumes are sound, the answers agree with
their choices and the splits are disjoint is found by `med3dvlm prepare check`, which reads every file.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..naming import name_a_few
from .layout import CAP_INDEX, CHOICE_COLUMNS, QUESTION_COLUMNS, VQA_FOLDER, vqa_file
from .samples import CHOICE_LETTERS, QUESTION_TYPES, SAMPLE_FEATURES, SPLITS, Split, Task


logger = logging.get_logger(__name__)

VQA_TASKS: tuple[Task, ...] = ("closed_vqa", "open_vqa", "yes_no_vqa")

# Shards of a streamed data set: enough to be dealt out evenly to the usual numbers of processes and workers.
NUM_SHARDS = 64
# Small files are waited for, not computed on: on a network disk many at once take hardly longer than one.
NUM_READERS = 16
# Characters that a cell of a CSV file may have. Python's own limit, 131072, is less than some reports with their history.
MAX_CELL = 2**27
# The end of a message on files that are missing.
SKIP_HINT = (
    "Bring them there; to train without them, set data.skip_broken=true in the recipe, and to evaluate without them, give "
    "--skip-broken."
)
# What to do with samples that lack a text: raise, leave them out, or keep them in their places, so that the others keep their
# numbers, for the caller to leave out (see `missing_text`).
SkipEmpty = bool | Literal["keep"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_m3d_cap(
    root: str | Path,
    split: Split,
    *,
    streaming: bool = False,
    check_files: bool = True,
    skip_empty: SkipEmpty = False,
    left_out: list[dict[str, str]] | None = None,
) -> Dataset | IterableDataset:
    """
    Reads the reports of M3D-Cap in its prepared layout (`M3D_Cap_npy/M3D_Cap.json`).

    Reports are read at once, a volume only when its sample is used. `image` holds paths, which `datasets` decodes
    lazily where wanted: `dataset.cast_column("image", datasets.Nifti())` gives nibabel images whose voxels stay on
    disk until indexed.

    Args:
        root (`str` or `Path`):
            Folder that holds `M3D_Cap_npy`.
        split (`str`):
            `"train"`, `"validation"` or `"test"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` of up to 64 shards instead.
        check_files (`bool`, *optional*, defaults to `True`):
            Look whether every volume exists. Leave it out where that takes long and was done before.
        skip_empty (`bool` or `"keep"`, *optional*, defaults to `False`):
            Leave samples with an empty report, or none, out and name them in a warning, instead of raising. `"keep"` leaves
            them in their places, see [`missing_text`].
        left_out (`list`, *optional*):
            With `skip_empty`: gets a row `{"source": ..., "row": ..., "column": ..., "reason": ...}` for each sample left out.

    Returns:
        `datasets.Dataset` with `SAMPLE_FEATURES`, task `"report"`, in the order of the file. `answer` is the report
        without white space at its ends; `case` the folder of the series without `M3D_Cap_npy`, such as
        `"ct_case/000006"`.

    Raises:
        FileNotFoundError: the index, a report or a volume is missing; all are counted, the first few named.
        ValueError: the split or the form of the index is unknown, or a report is empty.

    Example:

    ```python
    >>> from datasets import Nifti
    >>> from med3dvlm.train.data.m3d import read_m3d_cap

    >>> dataset = read_m3d_cap("data", "train")
    >>> dataset[0]["case"], dataset[0]["answer"]
    >>> dataset.cast_column("image", Nifti())[0]["image"].dataobj.shape
    ```"""
    check_split(split)
    root, index = Path(root), Path(root) / CAP_INDEX
    entries = read_cap_index(index, split)
    table = SampleTable(index, skip_empty, left_out)
    texts = read_texts([str(root / text) for _, text in entries], index, may_be_missing=bool(skip_empty))
    for row, ((image, _), text) in enumerate(zip(entries, texts)):
        where, path = f'"{split}"[{row}]', resolve_image(root, image)
        if text is None and skip_empty != "keep":
            table.leave_out(where, "report", "there is no such file")
        else:
            table.add(where, image=path, case=case_of(image), task="report", answer=text or "")
    return table.build(streaming=streaming, check_files=check_files)


def read_m3d_vqa(
    root: str | Path,
    split: Split,
    tasks: Sequence[Task] = ("closed_vqa", "open_vqa"),
    *,
    streaming: bool = False,
    check_files: bool = True,
    skip_empty: SkipEmpty = False,
    left_out: list[dict[str, str]] | None = None,
) -> Dataset | IterableDataset:
    """
    Reads the questions of M3D-VQA (`M3D-VQA/*.csv`).

    Each row gives one sample for each of the `tasks`: `"closed_vqa"` with the choices A to D, `"open_vqa"` without,
    both from `M3D_VQA_{train,val,test}.csv`; `"yes_no_vqa"` from `M3D_VQA_yn_{train,val,test}.csv`. Cells are text:
    a choice `None`, `NA` or `1` stays what it is.

    Args:
        root (`str` or `Path`):
            Folder that holds `M3D-VQA`, and the folders that its paths name.
        split (`str`):
            `"train"`, `"validation"` (the files call it `val`) or `"test"`.
        tasks (`Sequence[str]`, *optional*, defaults to `("closed_vqa", "open_vqa")`):
            Some of `"closed_vqa"`, `"open_vqa"`, `"yes_no_vqa"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` of up to 64 shards instead.
        check_files (`bool`, *optional*, defaults to `True`):
            Look whether every volume exists.
        skip_empty (`bool` or `"keep"`, *optional*, defaults to `False`):
            Leave samples with an empty question, answer or choice out and name them in a warning, instead of raising. `"keep"`
            leaves them in their places, see [`missing_text`].
        left_out (`list`, *optional*):
            With `skip_empty`: gets a row `{"source": ..., "row": ..., "column": ..., "reason": ...}` for each sample left out.

    Returns:
        `datasets.Dataset` with `SAMPLE_FEATURES`: row by row, within a row in the order of `tasks`, yes/no questions
        last.

    Raises:
        FileNotFoundError: a CSV file or a volume is missing. Yes/no questions were published for `train` alone.
        ValueError: a split, task, column, question type or letter is unknown, or a text is empty.
    """
    check_split(split)
    _check_tasks(tasks)
    table = SampleTable(Path(root) / VQA_FOLDER, skip_empty, left_out)
    choice_tasks = [task for task in tasks if task != "yes_no_vqa"]
    if choice_tasks:
        columns = QUESTION_COLUMNS + (CHOICE_COLUMNS if "closed_vqa" in choice_tasks else ())
        _add_questions(table, Path(root), Path(root) / vqa_file(split, choice_tasks[0]), columns, choice_tasks)
    if "yes_no_vqa" in tasks:
        path = Path(root) / vqa_file(split, "yes_no_vqa")
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path}. M3D publishes yes/no questions for the split train only: leave "
                '"yes_no_vqa" out of `tasks`, or write a file with the columns of M3D_VQA_yn_train.csv.'
            )
        _add_questions(table, Path(root), path, QUESTION_COLUMNS, ["yes_no_vqa"])
    return table.build(streaming=streaming, check_files=check_files)


def read_m3d_cap_raw(
    source: str | Path, *, streaming: bool = False, skip_empty: bool = False
) -> Dataset | IterableDataset:
    """
    Reads the case folders that M3D-Cap was published as: `SOURCE/<case>/<series>/<number>.png` (or `.jpeg`), with the
    report in `SOURCE/<case>/*.txt`. A series may be a NIfTI file too, and a case folder may lie deeper, as in
    `SOURCE/ct_case/000006`: cases and series are those that `med3dvlm prepare m3d-cap` finds.

    Args:
        source (`str` or `Path`):
            Folder of the case folders.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` of up to 64 shards instead.
        skip_empty (`bool`, *optional*, defaults to `False`):
            Leave cases with an empty report, without a report that can be read, with two texts that could be it or without
            a series out and name them in a warning, instead of raising.

    Returns:
        `datasets.Dataset` with `SAMPLE_FEATURES`, task `"report"`, sorted by path. `image` is the folder or the file of a
        series, `case` the case's folder relative to `source`. There are no splits; M3D names them in its `M3D_Cap.json`.
        A warning names folders without slices in cases that have other series.

    Raises:
        FileNotFoundError: there is no folder `source`.
        ValueError: it holds no case, a case has no report or no series, a report is empty or cannot be read, or two texts
            could be the report.
    """
    from .slices import find_cases, find_rival_texts, find_series, folders_without_series, read_report

    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}. Expected one of case folders, as M3D-Cap has them.")
    table = SampleTable(source, skip_empty)
    cases = find_cases(source)
    broken: dict[str, str] = {}
    unused: list[str] = []
    rivals = find_rival_texts(source, cases)
    for case in cases:
        if case in rivals:
            broken[case] = rivals[case]
            continue
        try:
            report = read_report(source / case)
        except FileNotFoundError:
            broken[case] = "no report"
            continue
        except ValueError as error:  # several texts, or one that is not UTF-8
            broken[case] = str(error).removeprefix(str(source / case)).lstrip(f":{os.sep} ").rstrip(".")
            continue
        series = find_series(source / case)
        if not series:
            has_jpg = bool(find_series(source / case, accept_jpg=True))
            broken[case] = "only .jpg slices" if has_jpg else "no series"
            continue
        unused += [folder.relative_to(source).as_posix() for folder in folders_without_series(source / case, series)]
        for path in series:
            table.add(case, image=str(path.absolute()), case=case, task="report", answer=report)
    if broken:
        _refuse_broken_cases(source, len(cases), broken, skip_empty)
    if unused:
        logger.warning(
            f"{len(unused)} folders in cases of {source} hold neither .png or .jpeg slices nor NIfTI files, and are left out: "
            f"{name_a_few(unused)}."
        )
    return table.build(streaming=streaming, check_files=False)


def _refuse_broken_cases(source: Path, num_cases: int, broken: Mapping[str, str], skip_empty: bool) -> None:
    """Raises for cases of which no sample can be made, or warns of them with `skip_empty`."""
    from .slices import JPG_REMEDY

    named = name_a_few([f"{case} ({reason})" for case, reason in broken.items()])
    message = f"{len(broken)} of the {num_cases} cases in {source} give no sample: {named}."
    if skip_empty:
        logger.warning(f"{message} They are left out.")
        return
    remedy = f" Of .jpg slices: {JPG_REMEDY}." if "only .jpg slices" in broken.values() else ""
    raise ValueError(
        f"{message} Expected one .txt file in each, and folders of .png or .jpeg slices or NIfTI files: complete the cases or "
        f"take them out, or pass `skip_empty=True` to leave them out.{remedy}"
    )


class SampleTable:
    """
    Samples on their way into a `datasets.Dataset`: collects rows, refuses gaps, looks whether the volumes exist.

    Args:
        source (`Path`):
            File or folder that messages name.
        skip_empty (`bool` or `"keep"`):
            Whether samples without a question, an answer or one of their choices are left out, or raise, or are kept.
        left_out (`list`, *optional*):
            Gets a row `{"source": ..., "row": ..., "column": ..., "reason": ...}` for each sample that is left out.
    """

    def __init__(self, source: Path, skip_empty: SkipEmpty = False, left_out: list[dict[str, str]] | None = None):
        self.source, self.skip_empty = source, skip_empty
        self.columns: dict[str, list[Any]] = {name: [] for name in SAMPLE_FEATURES}
        self.empty: list[str] = []
        self.left_out: list[dict[str, str]] = [] if left_out is None else left_out

    def add(
        self,
        where: str,
        *,
        image: str,
        case: str,
        task: Task,
        answer: str,
        question: str = "",
        choices: Sequence[str] = (),
        answer_choice: str = "",
        question_type: int = 0,
    ) -> None:
        """Adds a sample, or notes that it is empty. `where` tells the place in the source."""
        question, answer = question.strip(), answer.strip()
        lacking = missing_text({"task": task, "question": question, "answer": answer, "choices": choices})
        if lacking is not None and self.skip_empty != "keep":
            self.leave_out(where, lacking, "empty text")
            return
        sample = (image, case, task, question, list(choices), answer, answer_choice, question_type)
        for column, value in zip(self.columns.values(), sample):
            column.append(value)

    def leave_out(self, where: str, column: str, reason: str) -> None:
        """Notes a sample that lacks a text. The note names its place, never what stands in other columns."""
        self.empty.append(f"{where} ({column})")
        self.left_out.append({"source": self.source.name, "row": where, "column": column, "reason": reason})

    def build(self, *, streaming: bool, check_files: bool) -> Dataset | IterableDataset:
        """
        Raises:
            FileNotFoundError: a volume is missing.
            ValueError: a text is empty, or there are no samples at all.
        """
        if self.empty:
            message = f"{len(self.empty)} empty texts in {self.source}: {name_a_few(self.empty)}."
            if not self.skip_empty:
                raise ValueError(
                    f"{message} A sample without a text would train on nothing: fill them in, or take them out; in Python, "
                    "`skip_empty=True` leaves them out, in a recipe data.skip_broken=true and in an evaluation --skip-broken, "
                    "which also list them."
                )
            logger.warning(f"{message} They are left out.")
        if not self.columns["image"]:
            raise ValueError(f"{self.source} holds no samples.")
        if check_files:
            check_images_exist(self.columns["image"], self.source)
        # As `Dataset.from_dict`, which looks at every text on its own and takes several times as long.
        dataset = Dataset(pa.Table.from_pydict(self.columns, schema=SAMPLE_FEATURES.arrow_schema))
        return dataset.to_iterable_dataset(num_shards=min(NUM_SHARDS, len(dataset))) if streaming else dataset


def missing_text(sample: Mapping[str, Any]) -> str | None:
    """What a sample lacks, "report", "question", "answer" or "choices", by a row of `SAMPLE_FEATURES`; None if nothing."""
    is_report = sample["task"] == "report"
    if not sample["answer"]:
        return "report" if is_report else "answer"
    if not is_report and not sample["question"]:
        return "question"
    return "choices" if sample["task"] == "closed_vqa" and not all(sample["choices"]) else None


def resolve_image(root: Path, image: str) -> str:
    """The absolute path of a volume. M3D's files may still name the `.npy` that the `.nii.gz` was made from."""
    if image.endswith(".npy"):
        image = image.removesuffix(".npy") + ".nii.gz"
    return os.path.abspath(os.path.join(root, image))  # noqa: PTH100, PTH118 (faster, for half a million rows)


def case_of(image: str) -> str:
    """The folder of a series, without the data set's own folder: `M3D_Cap_npy/ct_case/6/a.nii.gz` -> `ct_case/6`."""
    folders = image.replace("\\", "/").split("/")[:-1]
    if len(folders) > 1 and folders[0].startswith("M3D_Cap"):
        folders = folders[1:]
    return "/".join(folders)


def check_images_exist(paths: Iterable[str], source: Path) -> None:
    """
    Raises:
        FileNotFoundError: volumes are missing; says how many of how many and names a few.
    """
    unique = list(dict.fromkeys(paths))
    missing = [path for path, exists in zip(unique, parallel(os.path.exists, unique)) if not exists]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(unique)} volumes that {source} names are missing: {name_a_few(missing)}. "
            f"Paths are relative to the data set's folder{hint_at_backslashes(missing)}; volumes of M3D are made by "
            f"`med3dvlm prepare m3d-cap`. {SKIP_HINT}"
        )


def hint_at_backslashes(paths: Iterable[str]) -> str:
    """What to do, as the end of a sentence, where missing paths are written as on Windows, and this is another system."""
    if os.sep == "\\" or not any("\\" in path for path in paths):
        return ""
    return "; backslashes, as Windows writes them, separate no folders here: write / instead"


def read_texts(paths: Sequence[str], source: Path, may_be_missing: bool = False) -> list[str | None]:
    """
    Reads small text files (UTF-8), many at once; a file that is named twice is read once.

    Returns:
        `list[str | None]`: their texts; None for a file that is missing, which only `may_be_missing` allows.

    Raises:
        FileNotFoundError: files are missing; says how many and names a few.
        ValueError: a file is not UTF-8.
    """
    unique = list(dict.fromkeys(paths))
    texts = dict(zip(unique, parallel(_read_text_if_there, unique)))
    missing = [path for path, text in texts.items() if text is None]
    if missing and not may_be_missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(unique)} reports that {source} names are missing: {name_a_few(missing)}. "
            f"{SKIP_HINT}"
        )
    return [texts[path] for path in paths]


def _read_text_if_there(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None


def parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each item, in order, many waiting for the disk at a time."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(function, items))


def read_csv_rows(
    path: Path, required: Iterable[str] = (), check_header: Callable[[list[str]], None] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    r"""
    Reads a CSV file (UTF-8) row by row, all cells as text. Line breaks in them become `\n`, whatever system wrote the file.

    Args:
        path (`Path`):
            The file; its first row names the columns.
        required (`Iterable[str]`, *optional*):
            Columns that must be there.
        check_header (`Callable`, *optional*):
            Given the names of the columns before any row is read, raises if they are not as expected.

    Yields:
        `tuple[int, dict[str, str]]`: the row's number as a spreadsheet shows it (the header is row 1), and its cells.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or named twice, a row is too long or short, or the file is not CSV with commas.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    csv.field_size_limit(max(MAX_CELL, csv.field_size_limit()))
    # Not with `newline=""`, which would keep the line breaks of Windows within texts: models would learn to write them.
    with path.open(encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True)  # a quote after a blank opens a text, too
        try:
            _check_delimiter(path, file.readline())
            file.seek(0)
            header = [name.strip() for name in next(reader, [])]
            width = len(header)
            while header and not header[-1]:  # spreadsheets save the empty columns beside a table
                header.pop()
            _check_header(path, header, required)
            if check_header is not None:
                check_header(header)
            for row, cells in enumerate(reader, start=2):
                if not any(cell.strip() for cell in cells):  # a blank line, or an empty row of a spreadsheet, as `,,`
                    continue
                if len(cells) != width:
                    raise ValueError(
                        f"{path}, row {row}: expected {width} cells as in the header, got {len(cells)}. A text "
                        'with commas or line breaks must stand in double quotes, a double quote in it as "".'
                    )
                if any(cells[len(header) :]):
                    raise ValueError(
                        f"{path}, row {row}: has a text in a column without a name. Name it, or empty it."
                    )
                yield row, dict(zip(header, cells))
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}, is not valid CSV: {error}. A text that begins with a double quote "
                "must stand in double quotes, each one in it doubled."
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def _check_delimiter(path: Path, header: str) -> None:
    """Refuses a table whose columns something else than commas separates, as the first line shows before it is parsed."""
    unquoted = re.sub(r'"[^"]*"', "", header)
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if sign in unquoted and "," not in unquoted:
            raise ValueError(
                f"{path}, header: expected commas between the columns, got {name}, it seems. Save it as CSV with commas; a "
                "text with commas must then stand in double quotes."
            )


def _check_header(path: Path, header: list[str], required: Iterable[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}. Its columns: {', '.join(header) or 'none'}.")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} names columns twice: {', '.join(repeated)}. Expected each once.")


def check_split(split: str) -> None:
    """
    Raises:
        ValueError: it is no split.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")


def question_type_number(text: str, where: str, show: bool = True) -> int:
    """
    The number of a question type, given as number, such as `3` or `3.0`, or as name; 0 for none.

    Raises:
        ValueError: there is no such type; `where` tells the place, and with `show` the message has the text.
    """
    name_or_number = re.sub(r"(?<=\d)\.0+$", "", text.strip().lower())  # pandas writes a column with gaps as floats
    for number, name in QUESTION_TYPES.items():
        if name_or_number in (str(number), name):
            return number
    if name_or_number in ("", "0"):
        return 0
    known = ", ".join(f"{number} {name}" for number, name in QUESTION_TYPES.items())
    found = repr(text) if show else "something else"
    raise ValueError(f"{where}: expected a question type out of {known}, got {found}.")


def choice_letter(text: str, where: str, show: bool = True) -> str:
    """
    The letter of a choice.

    Raises:
        ValueError: it is none of A to D; `where` tells the place, and with `show` the message has the text.
    """
    letter = text.strip().upper()
    if letter not in CHOICE_LETTERS:
        found = repr(text) if show else "something else"
        raise ValueError(f"{where}: expected the letter of the right choice, A to D, got {found}.")
    return letter


def _check_tasks(tasks: Sequence[str]) -> None:
    if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks) or not set(tasks) <= set(VQA_TASKS):
        raise ValueError(f"`tasks` must be a list of some of {', '.join(VQA_TASKS)}, each once, got {tasks!r}.")


def _add_questions(table: SampleTable, root: Path, path: Path, columns: Sequence[str], tasks: Sequence[Task]) -> None:
    places: dict[str, tuple[str, str]] = {}  # many questions share a volume, and so one text for its path and its case
    for row, cells in read_csv_rows(path, columns):
        for task in tasks:
            sample = parse_question(f"{path}, row {row}", cells, task)
            image = sample.pop("image")
            if image not in places:
                places[image] = resolve_image(root, image), case_of(image)
            table.add(f"{path.name}, row {row}", image=places[image][0], case=places[image][1], task=task, **sample)


def parse_question(where: str, cells: Mapping[str, str], task: str) -> dict[str, Any]:
    """
    The sample of a row of M3D-VQA.

    Args:
        where (`str`):
            Place of the row, for messages.
        cells (`Mapping`):
            As [`read_csv_rows`] gives them.
        task (`str`):
            `"closed_vqa"`, for which the choices are read, or another one.

    Returns:
        `dict` with the fields of `SAMPLE_FEATURES` but for `case` and `task`, texts without white space at their ends; `image` is
        the path as it stands there.

    Raises:
        ValueError: there is no path, or question type or letter are unknown.
    """
    image = cells["Image Path"].strip()
    if not image:
        raise ValueError(f"{where}: expected the path of a volume as Image Path, got an empty cell.")
    is_closed = task == "closed_vqa"
    return {
        "image": image,
        "question_type": question_type_number(cells["Question Type"], where),
        "question": cells["Question"].strip(),
        "choices": [cells[column].strip() for column in CHOICE_COLUMNS[:4]] if is_closed else [],
        "answer": cells["Answer"].strip(),
        "answer_choice": choice_letter(cells["Answer Choice"], where) if is_closed else "",
    }


def read_cap_index(path: Path, split: Split) -> list[tuple[str, str]]:
    """The paths of volume and report of each entry of one split."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Expected the folder that holds {Path(CAP_INDEX).parent}.")
    try:
        index = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(index, dict) or not isinstance(index.get(split), list):
        found = ", ".join(index) if isinstance(index, dict) else type(index).__name__
        raise ValueError(
            f'{path}: expected an object with the lists {", ".join(SPLITS)}, got no "{split}" in {found}.'
        )
    for row, entry in enumerate(index[split]):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "text")):
            raise ValueError(
                f'{path}, "{split}"[{row}]: expected {{"image": path, "text": path}}, got {json.dumps(entry)[:200]}.'
            )
    return [(entry["image"], entry["text"]) for entry in index[split]]


__all__ = ["SampleTable", "read_m3d_cap", "read_m3d_cap_raw", "read_m3d_vqa"]
