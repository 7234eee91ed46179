import os
import subprocess
from pathlib import Path

import pytest

from med3dvlm.train import command_line
from med3dvlm.train.command_line import launch


LAUNCH = Path(command_line.__file__).parent / "recipes" / "launch"
VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


@pytest.mark.parametrize("given, seconds", [(None, 280), ("60", 60)])
def test_torchrun_gives_processes_minutes_to_save(given, seconds, monkeypatch):
    api = pytest.importorskip("torch.distributed.launcher.api")
    environments = []

    class Process:
        def __init__(self, command, env=None):
            environments.append(os.environ if env is None else env)

        def wait(self):
            return 0

    if given:
        monkeypatch.setenv(VARIABLE, given)
    else:
        monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(subprocess, "Popen", Process)
    assert launch(2, ["train", "paper/contrastive"]) == 0
    assert environments[0]["PATH"] == os.environ["PATH"]
    monkeypatch.setenv(VARIABLE, environments[0].get(VARIABLE, "30"))
    config = api.LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if not hasattr(config, "shutdown_timeout"):
        pytest.skip("this torch has no time limit that can be set")
    assert config.shutdown_timeout == seconds


@pytest.mark.parametrize("script", ["slurm.sbatch", "torchrun_two_nodes.sh"])
@pytest.mark.parametrize("given, seconds", [(None, "280"), ("60", "60")])
def test_launch_scripts_give_processes_minutes_to_save(script, given, seconds, tmp_path):
    """The programs of the cluster are replaced by ones that say what they were given."""
    for name in ("torchrun", "srun", "scontrol"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} ${VARIABLE} $*"\n')
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HEAD": "first",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "first",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    if given:
        environment[VARIABLE] = given
    command = ["bash", str(LAUNCH / script), "paper/contrastive"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"run {seconds} " in result.stdout and "med3dvlm.train.cli train paper/contrastive" in result.stdout
