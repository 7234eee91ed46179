"""What the tests of preparation run in processes of their own."""

import os
import signal
import sys

import torch

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.train.data import prepare
from med3dvlm.train.data.cache import VolumeCache


IMAGE_SIZE = (8, 12, 16)


def prepare_case_or_die(case, settings):
    """As preparation does, but one case takes its process along, as when memory runs out."""
    if case == "000001":
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare._prepare_case(case, settings)


def load_into_cache(rank, folder, paths, output):
    """Loads all volumes, the second process in the opposite order, and saves what it got."""
    cache = VolumeCache(folder, Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE)))
    order = paths if rank == 0 else paths[::-1]
    volumes = {path: cache.load(path) for path in order}
    torch.save([volumes[path] for path in paths], f"{output}/{rank}.pt")


if __name__ == "__main__":
    prepare.prepare_m3d_cap(sys.argv[1], sys.argv[2], IMAGE_SIZE, num_workers=int(sys.argv[3]))
