"""Distributed tests: several processes on this machine, gloo between them, and no test that can hang."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


# gloo's connections between fresh processes fail now and then on a busy machine, before there is a group.
NOT_MET, NUM_ATTEMPTS = "Gloo connectFullMesh failed", 3


def run_processes(function: Callable, world_size: int, folder: Path, *arguments: Any, seconds: float = 120) -> None:
    """
    Runs `function(rank, *arguments)` in `world_size` processes that form a group, and waits for them.

    Args:
        function (`Callable`):
            A function of a module, so that it can be sent to the processes. What it finds out, it writes to a file.
        world_size (`int`):
            Number of processes.
        folder (`Path`):
            Empty folder in which they meet.
        seconds (`float`, *optional*, defaults to 120):
            After which the processes are ended and the test fails.
    """
    for attempt in range(NUM_ATTEMPTS):
        meeting_place = folder / f"rendezvous-{attempt}"
        context = mp.spawn(
            _run_rank, (function, world_size, str(meeting_place), arguments), nprocs=world_size, join=False
        )
        try:
            _wait(context, seconds, f"{function.__name__} was not done on {world_size} processes after {seconds} s")
            return
        except mp.ProcessRaisedException as error:
            if NOT_MET not in str(error) or attempt == NUM_ATTEMPTS - 1:
                raise


def _wait(context: Any, seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(message)


def _run_rank(rank: int, function: Callable, world_size: int, meeting_place: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_place}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    function(rank, *arguments)
    dist.barrier()
    sys.stdout.flush()
    # Without taking the interpreter down piece by piece: gloo's threads can hang or abort there.
    os._exit(0)
