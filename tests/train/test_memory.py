import platform
import subprocess
import sys
from pathlib import Path

import pytest

from med3dvlm.train.memory import keep_freed_memory


# Prints how many pages the system had to make for 20 times 8 tensors of 24 MiB.
COUNT_PAGES = """
import resource, torch
from med3dvlm.train.memory import keep_freed_memory

torch.ones(1)
assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    tensors = [torch.ones(6 * 2**20) for _ in range(8)]
    del tensors
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


def are_pages_huge() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


@pytest.mark.skipif(are_pages_huge(), reason="the system counts huge pages as if they were small")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of the GNU C library")
def test_memory_of_freed_tensors_is_used_again():
    """Otherwise up to all of the 20 times 192 MiB, sooner or later: what the library does by itself varies."""
    result = subprocess.run([sys.executable, "-c", COUNT_PAGES], capture_output=True, text=True, check=True)
    assert int(result.stdout) / 2**20 < 192 + 8 * 24


def test_other_libraries_have_no_such_settings(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
