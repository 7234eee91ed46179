"""Reading all volumes before training, in parallel: it fills the cache and finds the ones that cannot be read."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from ..files import write_json_lines
from ..processes import count_usable_cores, worker_pool
from .dataset import VolumeLoader


logger = logging.get_logger(__name__)

CHUNK_SIZE = 16
# What starting processes takes, in seconds: worth it for the rest that takes longer in this one.
START_SECONDS = 10.0


def read_all(
    volumes: VolumeLoader, images: Sequence[str], num_workers: int | None = None, progress: bool = False
) -> dict[str, str]:
    """
    Loads every volume once.

    Args:
        volumes ([`VolumeLoader`]):
            Loads the volumes; a `VolumeCache` keeps them.
        images (`Sequence[str]`):
            Their paths.
        num_workers (`int`, *optional*):
            Processes; as many as this one may use cores, if not given. What is read soon, because it is little or cached
            already, is read in this process.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar on stderr.

    Returns:
        `dict` from the path of each volume that cannot be read to the reason.
    """
    num_workers = num_workers or count_usable_cores()
    faults: dict[str, str] = {}
    chunks = [list(images[start : start + CHUNK_SIZE]) for start in range(0, len(images), CHUNK_SIZE)]
    with tqdm(total=len(images), desc="reading volumes", unit="volume", disable=not progress) as bar:
        while chunks:
            start = time.perf_counter()
            faults.update(_read_chunk(volumes, chunk := chunks.pop(0)))
            bar.update(len(chunk))
            if num_workers > 1 and len(chunks) * (time.perf_counter() - start) > START_SECONDS:
                break
        if not chunks:
            return faults
        with worker_pool(num_workers, partial(torch.set_num_threads, 1)) as pool:
            for chunk, found in zip(chunks, pool.map(_read_chunk, [volumes] * len(chunks), chunks)):
                faults.update(found)
                bar.update(len(chunk))
    return faults


def find_broken(
    volumes: VolumeLoader,
    images: Sequence[str],
    listing: Path | None = None,
    base: str | Path = "",
    reuse_listing: bool = False,
    progress: bool = False,
    left_out: Sequence[Mapping[str, str]] = (),
) -> list[str]:
    """
    Reads all volumes, and names those that cannot be read.

    Args:
        volumes ([`VolumeLoader`]):
            As in [`read_all`].
        images (`Sequence[str]`):
            Paths of the volumes.
        listing (`Path`, *optional*):
            File, JSON lines with `image` and `reason`, for the volumes that cannot be read, missing ones among them. Without it
            none may be broken.
        base (`str` or `Path`, *optional*):
            Folder that paths in the listing are relative to: a study may be moved.
        reuse_listing (`bool`, *optional*, defaults to `False`):
            Whether a `listing` that is there already is taken as it is: no volume is read then, and the same ones are left out
            as before, as a run that goes on from a checkpoint needs it.
        progress (`bool`, *optional*, defaults to `False`):
            As in [`read_all`].
        left_out (`Sequence[Mapping[str, str]]`, *optional*):
            What was left out for another reason, such as empty texts: stands in the listing, first.

    Returns:
        `list[str]`: their paths.

    Raises:
        ValueError: a volume cannot be read, and there is no `listing`.
    """
    if listing is None:
        faults = read_all(volumes, images, progress=progress)
        if faults:
            image, reason = next(iter(faults.items()))
            raise ValueError(
                f"{len(faults)} of {len(images)} volumes cannot be read, the first is {image}: {reason} Mend them, or set "
                "data.skip_broken=true to leave them out and have them listed."
            )
        return []
    if not (reuse_listing and listing.exists()):
        faults = read_all(volumes, images, progress=progress)
        rows = [{"image": os.path.relpath(image, base or None), "reason": faults[image]} for image in sorted(faults)]
        write_json_lines([*left_out, *rows], listing)
    with listing.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if "image" in row]
    listed = {os.path.abspath(os.path.join(base, row["image"])) for row in rows}  # noqa: PTH100, PTH118
    broken = [image for image in images if os.path.abspath(image) in listed]  # noqa: PTH100 (links stay)
    if broken:
        logger.warning(f"{len(broken)} volumes cannot be read and are left out; {listing} lists them with reasons.")
    return broken


def _read_chunk(volumes: VolumeLoader, images: list[str]) -> dict[str, str]:
    faults = {}
    for image in images:
        try:
            volumes.load(image)
        except (OSError, ValueError) as error:  # what loading documents; anything else is a fault of ours
            faults[image] = str(error)
    return faults


__all__ = ["find_broken", "read_all"]
