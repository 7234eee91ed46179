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
    context = mp.spawn(_run_rank, (function, world_size, str(folder), arguments), nprocs=world_size, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} was not done on {world_size} processes after {seconds} s")


def _run_rank(rank: int, function: Callable, world_size: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    function(rank, *arguments)
    dist.barrier()
    sys.stdout.flush()
    # Without taking the interpreter down piece by piece: gloo's threads can hang or abort there.
    os._exit(0)
