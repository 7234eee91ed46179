"""What an evaluation asks: read from the study, and without the samples that cannot be asked."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets

from ...processing.processing_med3dvlm import Med3DVLMProcessor
from ..checkpoints import done_by_first_process
from ..data.layout import SPLITS, Task, vqa_file
from ..data.m3d import missing_text
from ..data.manifest import find_manifest
from ..data.reading import find_broken
from ..data.study import first_cases, read_task
from ..run_files import SKIPPED, folder_of
from ..scoring import with_volume_of_another_case
from .loading import build_volumes
from .predictions import Reference, build_references
from .settings import EvaluationSettings, Work


@dataclass(frozen=True)
class Asked:
    """
    What is asked.

    Args:
        samples (`datasets.Dataset`): Rows of `SAMPLE_FEATURES`, one task after the other.
        references (`list[Reference]`): Of each sample, in their order.
        is_part (`bool`): Whether only the first cases of the split are meant to be asked.
        num_all (`int`): Number of samples with those that were left out, for whatever reason.
        empty (`list[dict[str, str]]`): A row with id, case, column and reason for each sample that was left out as it lacks a text.
        num_skipped (`int`, *optional*): Number of samples that were left out because they cannot be asked.
        skipped_note (`str`, *optional*): What a reader must know of volumes that were left out.
        blind (`datasets.Dataset`, *optional*): The samples with the volume of another case each, for the blind control.
    """

    samples: datasets.Dataset
    references: list[Reference]
    is_part: bool
    num_all: int
    empty: list[dict[str, str]]
    num_skipped: int = 0
    skipped_note: str | None = None
    blind: datasets.Dataset | None = None

    @property
    def num_cases(self) -> int:
        return len(set(self.samples["case"]))

    @property
    def is_part_of_split(self) -> bool:
        return self.is_part or self.num_all > len(self.references)


def read_asked(settings: EvaluationSettings, work: Work) -> Asked:
    """
    What can be asked. With `work.skip_broken`, samples that lack a text are left out, the others have the ids that they have
    among all, and a volume may be missing: see [`leave_out_broken`].

    Raises:
        FileNotFoundError: data are not there.
        ValueError: there is no task, or a task has no sample, or none with all its texts.
    """
    samples, is_part = read_samples(settings, work.skip_broken)
    references = build_references(samples)
    num_all = len(references)
    empty: dict[int, dict[str, str]] = {}
    for row, (sample, reference) in enumerate(zip(samples, references) if work.skip_broken else ()):
        column = missing_text(sample)
        if column is not None:
            reason = "empty text, or there is no such file" if column == "report" else "empty text"
            empty[row] = {"id": reference.id, "case": reference.case, "column": column, "reason": reason}
    if empty:
        kept = [row for row in range(num_all) if row not in empty]
        lost = sorted({entry.task for entry in references} - {references[row].task for row in kept})
        if lost:
            raise ValueError(
                f"{settings.data}: every sample of the task {lost[0]!r} lacks a text in the split {settings.split!r}. Fill them "
                "in, or choose other tasks."
            )
        samples, references = samples.select(kept), [references[row] for row in kept]
    return Asked(samples, references, is_part, num_all, list(empty.values()), num_skipped=len(empty))


def read_samples(settings: EvaluationSettings, keep_broken: bool = False) -> tuple[datasets.Dataset, bool]:
    """
    What is asked, one task after the other, and whether that is only a part of the split: with `settings.num_cases`, the samples
    of the first cases of each task, so that ids do not depend on what else is asked. With `keep_broken`, samples that lack a
    text or whose volume is missing are among them, see [`~train.data.study.read_task`].

    Raises:
        FileNotFoundError: data are not there.
        ValueError: there is no task, or a task has no sample.
    """
    if not settings.tasks:
        raise ValueError(
            f"{settings.data}: no questions in the split {settings.split!r}. `med3dvlm evaluate report` takes its reports."
        )
    parts, is_part = [], False
    for task in settings.tasks:
        whole = read_task(settings.data, settings.split, task, keep_broken)
        part = first_cases(whole, settings.num_cases)
        is_part = is_part or len(part) < len(whole)
        if len(part) == 0:
            raise ValueError(
                f"{settings.data}: the split {settings.split!r} has no sample of the task {task!r}. Choose other tasks."
            )
        parts.append(part)
    return datasets.concatenate_datasets(parts), is_part


def questions_of(data: str, split: str, keep_broken: bool = False) -> tuple[Task, ...]:
    """
    The tasks of questions that a study has: in the layout of M3D, those that there is a file of for the split. With
    `keep_broken`, volumes may be missing and texts empty.

    Raises:
        FileNotFoundError: there is no such study.
        ValueError: the split is not known.
    """
    if split not in SPLITS:
        raise ValueError(f"--split: expected one of {', '.join(SPLITS)}, got {split!r}.")
    root = Path(data).expanduser()
    tasks: tuple[Task, ...] = ("closed_vqa", "open_vqa", "yes_no_vqa")
    if find_manifest(root) is not None:
        return tuple(task for task in tasks if len(read_task(root, split, task, keep_broken)))
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: there is no such study. Expected a folder in the layout of M3D, or a manifest."
        )
    return tuple(task for task in tasks if (root / vqa_file(split, task)).is_file())


def check_blind_control(settings: EvaluationSettings, samples: datasets.Dataset) -> None:
    """
    Raises:
        ValueError: the blind control is asked for, and no case has another one.
    """
    num_cases = len(set(samples["case"]))
    if settings.blind and num_cases < 2:
        raise ValueError(
            f"The blind control needs samples of at least two cases, got {num_cases}: take more cases, or leave it out "
            "(--no-blind)."
        )


def leave_out_broken(
    output: Path, settings: EvaluationSettings, folder: str | None, asked: Asked, work: Work
) -> Asked:
    """
    What is asked about volumes that can be read, if those that cannot are to be left out; without a model, about all. With
    `settings.blind`, the samples of the blind control are added.

    Raises:
        ValueError: nothing is left of a task, or there is no sound volume of another case.
    """
    broken: list[str] = []
    if folder is not None:
        images = list(asked.samples["image"])
        broken = find_unreadable(output, settings, folder, images, work, folder_of(settings.data), asked.empty)
    blind = with_volume_of_another_case(asked.samples, broken) if settings.blind else None
    note, kept = leave_out(output, asked.samples, broken)
    return replace(
        asked,
        samples=asked.samples.select(kept),
        references=[asked.references[row] for row in kept],
        num_skipped=asked.num_all - len(kept),
        skipped_note=note,
        blind=None if blind is None else blind.select(kept),
    )


def take_first(asked: Asked, number: int) -> Asked:
    """The first samples, with the blind control among them alone."""
    if number >= len(asked.references):
        return asked
    samples = asked.samples.select(range(number))
    blind = None if asked.blind is None else with_volume_of_another_case(samples)
    return replace(asked, samples=samples, references=asked.references[:number], blind=blind)


def leave_out(output: Path, samples: datasets.Dataset, broken: Collection[str]) -> tuple[str | None, list[int]]:
    """
    What is left of samples without those whose image cannot be read.

    Returns:
        What a reader of the scores must know of that, `None` where nothing is left out; and the rows that are kept.

    Raises:
        ValueError: nothing is left of a task.
    """
    images, tasks = list(samples["image"]), list(samples["task"])
    without = set(broken)
    kept = [row for row, image in enumerate(images) if image not in without]
    if len(kept) == len(images):
        return None, kept
    lost = sorted(set(tasks) - {tasks[row] for row in kept})
    if lost:
        raise ValueError(
            f"Not one volume of the task {lost[0]!r} can be read: {output / SKIPPED} lists the reasons. Mend them, and remove "
            "this listing, so that all are read anew."
        )
    cases = {case for case, image in zip(samples["case"], images) if image in without}
    note = (
        f"{len(without)} volumes ({len(cases)} cases) cannot be read and were left out; {SKIPPED} lists them: "
        f"{len(images) - len(kept):,} of {len(images):,} samples were not scored."
    )
    return note, kept


def find_unreadable(
    output: Path,
    settings: EvaluationSettings,
    model: str,
    images: Sequence[str],
    work: Work,
    base: Path,
    empty: Sequence[Mapping[str, str]] = (),
) -> list[str]:
    """
    The images that cannot be read, the same ones in all processes: those in the folder's listing, which the first process makes
    by reading all of them, unless there is one. Its paths are relative to the folder `base`. What was left out as `empty` stands
    in it too. None without `work.skip_broken`.
    """
    if not work.skip_broken:
        return []

    def find() -> list[str]:
        volumes = build_volumes(Med3DVLMProcessor.from_pretrained(model), settings, work)
        return find_broken(
            volumes,
            list(dict.fromkeys(images)),
            output / SKIPPED,
            base=base,
            reuse_listing=True,
            progress=work.progress,
            left_out=empty,
        )

    return done_by_first_process(find)


__all__ = [
    "Asked",
    "check_blind_control",
    "find_unreadable",
    "leave_out_broken",
    "questions_of",
    "read_asked",
    "read_samples",
    "take_first",
]
