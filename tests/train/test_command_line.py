import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

from med3dvlm import DCFormerConfig, Med3DVLMConfig
from med3dvlm.processing.volume_io import InvalidVolumeError
from med3dvlm.train import command_line
from med3dvlm.train.cli import app
from med3dvlm.train.command_line import (
    SIGNALS_OF_TORCHRUN,
    bad_input_is_an_answer,
    check_answers_questions,
    in_options_of_the_command,
    launch,
)


LAUNCH = Path(command_line.__file__).parent / "recipes" / "launch"
VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


@pytest.mark.parametrize(
    "overrides, options, expected",
    [([], [], 1), (["training.use_cpu=false"], [], 8), ([], ["--processes", "3"], 3)],
)
def test_a_recipe_for_the_cpu_counts_no_gpus(overrides, options, expected, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("med3dvlm.train.cli.launch", lambda count, command: started.append(count) or 0)
    monkeypatch.setattr("med3dvlm.train.recipe.check_places", lambda recipe: None)
    monkeypatch.setattr("med3dvlm.train.recipe.check_packages", lambda recipe: None)
    command = ["train", "phantom/projector", "training.deepspeed=zero2", *overrides, *options]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert started == [expected]


@pytest.mark.parametrize("given, seconds", [(None, 280), ("60", 60)])
def test_torchrun_gives_processes_minutes_to_save(given, seconds, monkeypatch):
    api = pytest.importorskip("torch.distributed.launcher.api")
    environments = []

    class Process:
        def __init__(self, command, env=None, **options):
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


def test_torchrun_gets_sigterm_for_sigusr1_and_passes_both_on(monkeypatch):
    run = pytest.importorskip("torch.distributed.run")
    sent, environments = [], []

    class Process:
        def __init__(self, command, env=None, **options):
            environments.append(env)

        def send_signal(self, number):
            sent.append(number)

        def wait(self):
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
            return 143

    monkeypatch.setattr(subprocess, "Popen", Process)
    before = signal.getsignal(signal.SIGUSR1)
    assert launch(2, ["train", "paper/contrastive"]) == 143
    assert sent == [signal.SIGTERM] * 2 and signal.getsignal(signal.SIGUSR1) == before
    monkeypatch.setenv(
        SIGNALS_OF_TORCHRUN, environments[0][SIGNALS_OF_TORCHRUN]
    )  # as when SLURM signals all processes
    arguments = run.get_args_parser().parse_args(["program.py"])
    if not hasattr(arguments, "signals_to_handle"):
        pytest.skip("this torch has no choice of signals")
    assert arguments.signals_to_handle.split(",")[-1] == "SIGUSR1" and "SIGTERM" in arguments.signals_to_handle


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """Of the command and torchrun, and of torchrun and its processes, which call the same by themselves."""
    sleeper = f"{sys.executable} -c 'import time; time.sleep(60)'"
    start = (
        "import shlex, subprocess, time; from med3dvlm.train.command_line import prepare_to_end_with_parent; "
        f"child = subprocess.Popen(shlex.split({sleeper!r}), preexec_fn=prepare_to_end_with_parent()); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def is_running(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise KeyError("inside")
        except KeyError as error:
            raise InvalidVolumeError("scan.nii.gz: truncated or damaged.\nCopy it again.") from error


def test_an_error_of_a_loaders_worker_is_told_without_its_traceback(capsys):
    with pytest.raises(typer.Exit), bad_input_is_an_answer():
        list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    assert capsys.readouterr().err == "med3dvlm: scan.nii.gz: truncated or damaged.\nCopy it again.\n"


def test_a_value_that_a_configuration_refuses_is_told_in_one_line(capsys):
    with pytest.raises(typer.Exit) as caught, bad_input_is_an_answer():
        DCFormerConfig(image_size=(64, 64))
    assert caught.value.exit_code == 2
    message = "`image_size` must be three positive numbers of voxels (depth, height, width), got (64, 64)."
    assert capsys.readouterr().err == f"med3dvlm: {message}\n"


def test_an_adapter_on_the_hub_answers_too(monkeypatch, tmp_path):
    """What transformers finds on the Hub is stood in for; a repository with an adapter alone has no config.json."""
    asked = []

    def cached_file(repository, name, **options):
        asked.append((repository, name))
        return str(tmp_path / name) if repository == "org/adapter" else None

    monkeypatch.setattr(transformers.utils.peft_utils, "cached_file", cached_file)
    check_answers_questions("org/adapter")
    assert asked == [("org/adapter", "adapter_config.json")]
    Med3DVLMConfig().save_pretrained(tmp_path / "model")
    check_answers_questions(str(tmp_path / "model"))
    DCFormerConfig().save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="'dcformer', which answers no questions"):
        check_answers_questions(str(tmp_path / "encoder"))


@pytest.mark.parametrize("script", ["slurm.sbatch", "torchrun_two_nodes.sh"])
@pytest.mark.parametrize("given, seconds", [(None, "280"), ("60", "60")])
def test_launch_scripts_give_processes_minutes_to_save(script, given, seconds, tmp_path):
    """The programs of the cluster are replaced by ones that say what they were given."""
    for name in ("torchrun", "srun", "scontrol"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} ${VARIABLE} $*"; echo "signals ${SIGNALS_OF_TORCHRUN}"\n')
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
    assert "signals SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1\n" in result.stdout
    assert f"run {seconds} " in result.stdout and "med3dvlm.train.cli train paper/contrastive" in result.stdout


@pytest.mark.parametrize(
    "message, expected",
    [
        ('`hu_range`: pass `intensity_mode="window"` with it.', "--hu-range: pass --intensity-mode window with it."),
        ("For CT in HU ask for 'window'.", "For CT in HU ask with --intensity-mode window."),
        ("ask for 'minmax' or 'percentile'.", "ask with --intensity-mode minmax or --intensity-mode percentile."),
        ("`volume_index` 3, `hu_ranges`", "`volume_index` 3, `hu_ranges`"),
        ("or pass `overwrite=True`.", "or pass --overwrite."),
    ],
)
def test_messages_name_the_options_of_the_command(message, expected):
    options = {"hu_range": "--hu-range", "intensity_mode": "--intensity-mode", "overwrite": "--overwrite"}
    assert in_options_of_the_command(message, **options) == expected
