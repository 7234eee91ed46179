"""Memory of a process that computes on the CPU."""

import ctypes
import platform


# Names and numbers of settings in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# The most that the GNU C library takes for M_MMAP_THRESHOLD.
LARGEST_KEPT = 2**25


def keep_freed_memory() -> bool:
    """
    Lets this process keep what it frees, of tensors of up to 32 MiB, for its next ones.

    By itself the GNU C library soon returns freed memory to the system. The next tensor's pages are then made anew, one by one
    and filled with zeros, as they are first written, which can take as long as what is computed. A process that keeps its
    memory does not become smaller when it has less to do. From outside, for any program: `MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_MMAP_THRESHOLD_=33554432` in its environment. See `mallopt(3)`.

    Returns:
        `bool`: whether it is so now. The settings are those of the GNU C library; others have none.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


__all__ = ["keep_freed_memory"]
