"""How many processes work is shared between, and pools of processes that end with the one that started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


def count_usable_cores() -> int:
    """Cores that this process may use, where the system tells; else those of the machine."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def worker_pool(
    num_workers: int, initializer: Callable[[], Any] | None = None, preload: str | None = None
) -> Iterator[ProcessPoolExecutor]:
    """
    A pool of processes that end with this one, even if it is killed. Leaving the block, by an error too, waits for the tasks
    that run and drops those that have not begun.

    The processes are not forked from this one: torch's threads do not survive that.

    Args:
        num_workers (`int`):
            Number of processes.
        initializer (`Callable`, *optional*):
            Called in each process before its first task.
        preload (`str`, *optional*):
            Name of a module to be imported once, by a server that the processes are then forked from where the system has
            one: they start at once and share its memory. The server lasts as long as this process. Without it each process
            does its own imports.

    Yields:
        `ProcessPoolExecutor`.
    """
    has_server = preload is not None and "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([preload])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(initializer,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(initializer: Callable[[], Any] | None) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        # Else a process would wait for tasks for ever when the one that gives them was killed.
        threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer()


__all__ = ["count_usable_cores", "worker_pool"]
