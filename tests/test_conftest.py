"""The shared test set-up, in a process of its own: it must be able to run before anything else is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


CONFTEST = Path(__file__).parent / "conftest.py"


@pytest.mark.parametrize(
    "cores, expected",
    [
        ("os.sched_getaffinity = lambda process: set(range(7))", "3"),
        ("del os.sched_getaffinity; os.cpu_count = lambda: 8", "4"),  # as on macOS and Windows
        ("del os.sched_getaffinity; os.cpu_count = lambda: None", "1"),
    ],
)
def test_each_process_of_xdist_takes_its_share_of_the_cores(cores, expected):
    code = f"""
import os, runpy, sys
os.sched_getaffinity = None  # where the system has none
{cores}
runpy.run_path({str(CONFTEST)!r})
print(os.environ["OMP_NUM_THREADS"], {{"med3dvlm", "torch", "transformers"}} & set(sys.modules))
"""
    environment = {**os.environ, "PYTEST_XDIST_WORKER_COUNT": "2"}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.strip() == f"{expected} set()", result.stderr
