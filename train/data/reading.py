"""Reading all volumes before training, in parallel: it fills the cache and finds the ones that cannot be read."""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from ..cores import count_usable_cores
from ..files import write_json_lines
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
    num_workers = num_workers or count_usable_cores()
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


def find_broken(
    volumes: VolumeLoader, images: Sequence[str], listing: Path | None = None, progress: bool = False
) -> list[str]:
    """
    Reads all volumes, and names those that cannot be read.

    Args:
        volumes ([`VolumeLoader`]):
            As in [`read_all`].
        images (`Sequence[str]`):
            Paths of the volumes.
        listing (`Path`, *optional*):
            File, JSON lines with `image` and `reason`, for the volumes that cannot be read. Where it exists, nothing is read,
            and they are those that it lists: a resumed run leaves out the same ones. Without it none may be broken.
        progress (`bool`, *optional*, defaults to `False`):
            As in [`read_all`].

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
    if not listing.exists():
        faults = read_all(volumes, images, progress=progress)
        write_json_lines([{"image": image, "reason": reason} for image, reason in sorted(faults.items())], listing)
    with listing.open(encoding="utf-8") as lines:
        broken = [json.loads(line)["image"] for line in lines]
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
