"""What the commands of `med3dvlm` share: options, errors as one clear line, progress, and starting processes."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..hub_cards.places import is_owned_repository


ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder of a published model, or a Hub repository `org/name`.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


# Which signals torchrun passes on to its processes: its own choice, and SLURM's for `--signal=USR1@SECONDS`. The environment
# stands for its option `--signals-to-handle`, which older ones do not know.
SIGNALS_OF_TORCHRUN, ALL_SIGNALS = "PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
# What torch puts around an error of a loader's worker: the whole traceback, which ends with the error itself.
OF_A_WORKER = re.compile(
    r"Caught (\w+) in \S+ worker process \d+\.\nOriginal Traceback .*\n(?:[\w.]+\.)?\1: (.*)", re.DOTALL
)


@contextmanager
def bad_input_is_an_answer(**options_here: str) -> Iterator[None]:
    """
    Turns the errors that tell a user what to do into a line on stderr and exit code 2. Others are faults of ours.

    Args:
        options_here (`str`): Options of the command that messages may name, by their names in Python.
    """
    try:
        yield
    except answered_errors() as error:
        is_of_field = not isinstance(error, (ImportError, OSError, ValueError))  # what is wrong with it is the cause
        message = str(error.__cause__ or error) if is_of_field else str(error)
        if match := OF_A_WORKER.fullmatch(message):
            message = match[2].strip()
        typer.echo(f"med3dvlm: {in_options_of_the_command(message, **options_here)}", err=True)
        raise typer.Exit(code=2) from error


def answered_errors() -> tuple[type[Exception], ...]:
    """The errors that tell a user what to do. Those of a value that a configuration refuses derive from none of Python's."""
    from huggingface_hub.errors import StrictDataclassError

    return (ImportError, OSError, ValueError, StrictDataclassError)


def in_options_of_the_command(message: str, **options_here: str) -> str:
    """
    A message for a user of Python, as one for a user of a command.

    Args:
        message (`str`):
            With options in backticks, alone or with a value (`True` of one that takes none here), or a mode of intensity that it
            advises to ask for.
        options_here (`str`):
            The command's options, by their names in Python.

    Example:

    ```python
    >>> in_options_of_the_command('pass `intensity_mode="window"` with it', intensity_mode="--intensity-mode")
    'pass --intensity-mode window with it'
    ```"""
    for name, option in options_here.items():
        message = re.sub(rf"`{name}(?:=True)?`", option, message)
        message = re.sub(rf"`{name}=[\"']?([^`\"']+)[\"']?`", rf"{option} \1", message)
    if mode := options_here.get("intensity_mode"):
        message = re.sub(r"ask for '(\w+)'(?: or '(\w+)')?", lambda match: _with_modes(mode, match.groups()), message)
    return message


def _with_modes(option: str, modes: tuple[str | None, ...]) -> str:
    return "ask with " + " or ".join(f"{option} {mode}" for mode in modes if mode)


def hush_progress_bars() -> None:
    """Leaves out the progress bars of libraries where no one watches: in files and pipes they are noise."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if importlib.util.find_spec("datasets") is not None:
            from datasets.utils.logging import disable_progress_bar as disable_progress_bar_of_datasets

            disable_progress_bar_of_datasets()


@contextmanager
def step(message: str) -> Iterator[None]:
    """Says on stderr what is being done, and how long it took."""
    typer.echo(f"{message} ...", err=True)
    start = time.perf_counter()
    yield
    typer.echo(f"{message}: done in {time.perf_counter() - start:.1f} s", err=True)


def require_extra(extra: str, *modules: str) -> None:
    """
    Raises:
        ImportError: a package of an optional set is not installed; the message says how to install it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f'Missing packages: {", ".join(missing)}. In a clone of this repository run: pip install ".[{extra}]"'
        )


def check_model_name(model: str) -> str:
    """
    Raises:
        FileNotFoundError: `model` is neither a folder nor of the form `org/name`, or it is a folder without a model in it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{model}: expected a published model, the folder has no config.json.")
        return str(path)
    if not is_owned_repository(model):
        raise FileNotFoundError(
            f"{model}: expected a folder with a published model or a Hub repository `org/name`; there is no such folder."
        )
    return model


def check_answers_questions(model: str) -> None:
    """
    Raises:
        ValueError: the model is of another kind than those that answer.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(model) is not None:
        return  # its base model answers
    model_type = AutoConfig.from_pretrained(model).model_type
    if model_type != "med3dvlm":
        raise ValueError(
            f"{model}: expected a vision-language model (model_type 'med3dvlm'), got {model_type!r}, which answers no "
            "questions."
        )


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: torch cannot use the device.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device}: it cannot be used here ({error}). Try cpu.") from error


def is_to_be_launched(processes: int | None, use_cpu: bool = False, needs_launcher: bool = False) -> bool:
    """Whether processes are needed that are not there yet: more than one, or the surroundings that DeepSpeed expects."""
    if "RANK" in os.environ:
        if processes is not None:
            raise ValueError(
                "--processes has no place under torchrun or accelerate, which start the processes themselves."
            )
        return False
    return count_processes(processes, use_cpu) > 1 or needs_launcher


def count_processes(processes: int | None, use_cpu: bool = False) -> int:
    """How many processes of this machine a command is for: those asked for, or one for each GPU that is used, at least 1."""
    import torch

    return processes or max(1, 0 if use_cpu else torch.cuda.device_count())


def launch(num_processes: int, command: list[str]) -> int:
    """
    Runs a command of ours in processes of this machine by torchrun, and returns its exit code. After SIGTERM or SIGUSR1
    they have 280 s to save, unless `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` is set; torchrun would give them 30, and die of SIGUSR1.
    On Linux they save and stop also where this process is killed.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "280", SIGNALS_OF_TORCHRUN: ALL_SIGNALS, **os.environ}
    process = subprocess.Popen(
        [*torchrun, "-m", "med3dvlm.train.cli", *command], env=environment, preexec_fn=prepare_to_end_with_parent()
    )
    passed_on: dict[int, int] = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT}
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        passed_on[signal.SIGUSR1] = signal.SIGTERM  # which every torchrun passes on
    previous = {
        number: signal.signal(number, lambda received, frame: process.send_signal(passed_on[received]))
        for number in passed_on
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def prepare_to_end_with_parent() -> Callable[[], None] | None:
    """
    What a process calls to get SIGTERM when the one that started it ends, even by SIGKILL, which tells no one. It imports
    nothing, so that it can be called between fork and exec. None where there is no such thing: only Linux has it.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    library = ctypes.CDLL(None)

    def end_with_parent() -> None:
        library.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))

    return end_with_parent


def end_with_torchrun() -> None:
    """
    Has this process save and stop, as after SIGTERM, where the torchrun that started it is killed. Not under other launchers:
    what counts is the thread that started the process, and theirs may end before.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and (end_with_parent := prepare_to_end_with_parent()) is not None:
        end_with_parent()


__all__ = [
    "JsonOption",
    "ModelOption",
    "answered_errors",
    "bad_input_is_an_answer",
    "check_answers_questions",
    "check_device",
    "check_model_name",
    "count_processes",
    "end_with_torchrun",
    "hush_progress_bars",
    "in_options_of_the_command",
    "is_to_be_launched",
    "launch",
    "prepare_to_end_with_parent",
    "require_extra",
    "step",
]
