"""One way to the samples of a study, whatever layout it has."""

from pathlib import Path
from typing import Any

import datasets

from .m3d import read_m3d_cap, read_m3d_vqa
from .manifest import find_manifest, read_manifest
from .samples import TASKS, Split, Task


def read_task(root: str | Path, split: Split, task: Task, keep_broken: bool = False) -> datasets.Dataset:
    """
    The samples of one task.

    Args:
        root (`str` or `Path`):
            Folder in the layout of M3D, a manifest (.csv or .jsonl), or a folder that holds `manifest.csv` or `manifest.jsonl`.
        split (`str`):
            `"train"`, `"validation"` or `"test"`.
        task (`str`):
            One of `TASKS`.
        keep_broken (`bool`, *optional*, defaults to `False`):
            Keep samples whose volume is missing, or that lack a text, in their places instead of raising, for the caller to leave
            out: see [`~train.data.m3d.missing_text`].

    Returns:
        `datasets.Dataset` with `SAMPLE_FEATURES`, in the order of the files; of a manifest, it may be empty.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of its format, or the task is not known.
    """
    if task not in TASKS:
        raise ValueError(f"Expected a task out of {', '.join(TASKS)}, got {task!r}.")
    root = Path(root).expanduser()
    manifest = find_manifest(root)
    options: dict[str, Any] = {"check_files": False, "skip_empty": "keep"} if keep_broken else {}
    if manifest is not None:
        samples = read_manifest(manifest, split, **options)
        samples = samples.filter(lambda name: name == task, input_columns="task", load_from_cache_file=False)
    elif not root.is_dir():
        raise FileNotFoundError(
            f"{root}: there is no such study. Expected a folder in the layout of M3D, or a manifest."
        )
    elif task == "report":
        samples = read_m3d_cap(root, split, **options)
    else:
        samples = read_m3d_vqa(root, split, [task], **options)
    assert isinstance(samples, datasets.Dataset)
    return samples


def first_cases(samples: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """The samples of the first `number` cases; all without a number."""
    if number is None:
        return samples
    cases = set(list(dict.fromkeys(samples["case"]))[:number])
    return samples.select([row for row, case in enumerate(samples["case"]) if case in cases])


__all__ = ["first_cases", "read_task"]
