"""The paper's model at its full size, once from construction to an answer."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nibabel.testing import data_path


GIB = 2**30


def has_room(folder: Path) -> bool:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory >= 20 * GIB and shutil.disk_usage(folder).free >= 20 * GIB


@pytest.mark.slow
def test_full_size_model_answers_within_24_gib(tmp_path):
    if not has_room(tmp_path):
        pytest.skip("needs 20 GiB of memory and 20 GiB of disk")
    script = Path(__file__).with_name("full_size.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "model")], check=True)
    command = [
        sys.executable,
        "-m",
        "med3dvlm.train.cli",
        "ask",
        str(Path(data_path) / "anatomical.nii"),
        "What is this?",
    ]
    command += ["--model", str(tmp_path / "model"), "--max-new-tokens", "8"]
    subprocess.run(command, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 24 * GIB
