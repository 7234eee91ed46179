import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


# In each of them work is shared between two processes, which say who they are and take a minute.
PROGRAMS = {
    "read_all": """
from med3dvlm.train.data import reading

class Volumes:
    load = staticmethod(work)

if __name__ == "__main__":
    reading.START_SECONDS = 0
    reading.read_all(Volumes(), [str(number) for number in range(3 * reading.CHUNK_SIZE)], num_workers=2)
""",
    "write_study": """
from med3dvlm.train.phantoms import study

if __name__ == "__main__":
    study.make_case = work
    study.write_study(sys.argv[1], 8, num_workers=2, progress=False)
""",
}
WORK = """
import multiprocessing, os, sys, time

def work(*arguments, **options):
    print(os.getpid(), flush=True)
    if multiprocessing.parent_process() is not None:
        time.sleep(60)
"""


def is_running(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("name", PROGRAMS)
def test_workers_end_when_the_process_that_started_them_is_killed(name, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WORK + PROGRAMS[name])
    command = [sys.executable, str(program), str(tmp_path / "study")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    workers = set()
    while len(workers) < 2:
        workers |= {int(parent.stdout.readline())} - {parent.pid}
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while remaining := [pid for pid in workers if is_running(pid)]:
        assert time.monotonic() < deadline, [os.kill(pid, signal.SIGKILL) for pid in remaining]
        time.sleep(0.05)
