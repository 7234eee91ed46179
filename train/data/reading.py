"""Reading all volumes before training, in parallel: it fills the cache and finds the ones that cannot be read."""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import torch
from tqdm import tqdm
from transformers.utils import logging

from ..files import write_atomically
from .dataset import VolumeLoader


logger = logging.get_logger(__name__)

# Below so many volumes, starting processes takes longer than reading.
FEW_VOLUMES = 64


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
            Processes; as many as this one may use cores, if not given. A few volumes are read in this process.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar on stderr.

    Returns:
        `dict` from the path of each volume that cannot be read to the reason.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    faults: dict[str, str] = {}
    with tqdm(total=len(images), desc="reading volumes", unit="volume", disable=not progress) as bar:
        if num_workers == 1 or len(images) < FEW_VOLUMES:
            for image in images:
                faults.update(_read_chunk(volumes, [image]))
                bar.update()
            return faults
        chunks = [list(images[start : start + 16]) for start in range(0, len(images), 16)]
        # Fresh processes: one that is forked after torch has started its threads can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for chunk, found in zip(chunks, pool.map(_read_chunk, [volumes] * len(chunks), chunks)):
                faults.update(found)
                bar.update(len(chunk))
    return faults


def leave_out_broken(samples: datasets.Dataset, faults: dict[str, str], listing: Path) -> datasets.Dataset:
    """
    The samples whose volume can be read. The others are listed with their reasons, once and for all: a resumed run leaves out
    the same ones.

    Args:
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES`.
        faults (`dict[str, str]`):
            As [`read_all`] returned them; not looked at where the listing exists.
        listing (`Path`):
            JSON lines with `image` and `reason`.

    Raises:
        ValueError: not one volume can be read.
    """
    if not listing.exists():
        rows = [json.dumps({"image": image, "reason": reason}) + "\n" for image, reason in sorted(faults.items())]
        write_atomically("".join(rows).encode(), listing)
    broken = {json.loads(line)["image"] for line in listing.read_text(encoding="utf-8").splitlines()}
    if broken:
        logger.warning(f"{len(broken)} volumes cannot be read and are left out; {listing} lists them with reasons.")
    kept = [row for row, image in enumerate(samples["image"]) if image not in broken]
    if not kept:
        raise ValueError(f"Not one volume can be read: {listing} lists the reasons.")
    return samples.select(kept)


def _read_chunk(volumes: VolumeLoader, images: list[str]) -> dict[str, str]:
    faults = {}
    for image in images:
        try:
            volumes.load(image)
        except (OSError, ValueError) as error:  # what loading documents; anything else is a fault of ours
            faults[image] = str(error)
    return faults


__all__ = ["leave_out_broken", "read_all"]
