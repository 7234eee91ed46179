"""What an evaluation works with: its processes, their device, and the model that is evaluated."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig

from ...hub_cards.publish import check_source, check_whole, load_model
from ...processing.processing_med3dvlm import Med3DVLMProcessor
from ...processing.volume_io import InvalidVolumeError
from ..checkpoints import done_by_first_process
from ..data.cache import volume_loader
from ..data.dataset import VolumeLoader
from .folders import snapshot_of
from .settings import EvaluationSettings, Work


# For processes whose share is done sooner. The default of torch, minutes, ends an evaluation of many cases at its last step.
LONGEST_WAIT = timedelta(days=2)


def start_processes(work: Work) -> PartialState:
    """The processes of this evaluation, one if it was not started by torchrun or accelerate."""
    return PartialState(cpu=choose_device(work) == "cpu", timeout=LONGEST_WAIT)


def start_single_process(work: Work) -> PartialState:
    """
    The process of an evaluation whose work cannot be split between processes.

    Raises:
        ValueError: it was started in several processes.
    """
    state = start_processes(work)
    if state.num_processes > 1:
        raise ValueError(
            f"Expected one process, got {state.num_processes}: this evaluation cannot be split between processes, each would do all "
            "of the work and write the same files. Start it without torchrun or accelerate."
        )
    return state


def choose_device(work: Work) -> str:
    """`work.device`, or CUDA if there is one."""
    return work.device or ("cuda" if torch.cuda.is_available() else "cpu")


def device_of_process(work: Work) -> str:
    """The device of this process: with several GPUs each process has its own. To be called after [`start_processes`]."""
    device = choose_device(work)
    return f"cuda:{PartialState().local_process_index}" if device == "cuda" else device


def find_model(model: str) -> str:
    """
    The folder of a model: of a repository on the Hub, its files on this machine, of one revision in all processes. To be called
    after [`start_processes`].

    Raises:
        OSError: there is no such model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    check_source(model)
    found = done_by_first_process(lambda: str(snapshot_of(model)))
    return found if Path(found).is_dir() else str(snapshot_of(model, Path(found).name))  # on another machine


def describe_work(model: str, settings: EvaluationSettings, work: Work) -> dict[str, Any]:
    """What answers in low precision depend on beside the settings: how many at a time, in which precision, and where."""
    device = device_of_process(work)
    is_cuda = torch.device(device).type == "cuda"
    dtype = AutoConfig.from_pretrained(model).dtype if settings.dtype == "auto" else settings.dtype
    return {
        "batch_size": work.batch_size,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{device}, {platform.machine()}",
        "num_processes": PartialState().num_processes,
    }


@contextmanager
def broken_scans_have_a_way_out(work: Work) -> Iterator[None]:
    """
    Raises:
        FileNotFoundError, InvalidVolumeError: as they come, with what else can be done about them.
    """
    try:
        yield
    except (FileNotFoundError, InvalidVolumeError) as error:
        if work.skip_broken:
            raise
        hint = "Mend it, or go on without such scans: --skip-broken."
        raise type(error)(f"{str(error).rstrip('. ')}. {hint}") from error


def model_type_of(model: str) -> str:
    """
    The type of a model, read from its configuration.

    Raises:
        OSError: there is no such model, or only an adapter; the message says how to merge it.
    """
    check_whole(model)
    return AutoConfig.from_pretrained(model).model_type


def check_kind(model: str, kind: type[Any]) -> None:
    """
    Raises:
        OSError: there is no such model, or only an adapter.
        ValueError: it is of another kind.
    """
    model_type = model_type_of(model)
    if model_type != kind.config_class.model_type:
        raise ValueError(f"{model}: expected a {kind.__name__}, got a model of the type {model_type!r}.")


def load_for_evaluation(model: str, kind: type[Any], settings: EvaluationSettings, work: Work) -> tuple[Any, Any]:
    """
    A published model of one kind, in its precision and on its device, and its processor. Its weights go to a GPU directly: the
    CPU's memory need not hold them all.

    Raises:
        OSError: it is not there.
        ValueError: it is of another kind.
    """
    check_kind(model, kind)
    device = device_of_process(work)
    device_map = {"": device} if torch.device(device).type == "cuda" else None
    loaded: Any = load_model(model, settings.dtype, device_map)
    return loaded.eval().to(device), Med3DVLMProcessor.from_pretrained(model)


def build_volumes(processor: Any, settings: EvaluationSettings, work: Work) -> VolumeLoader:
    """What brings the scans through the model's own image processor."""
    return volume_loader(processor.image_processor, settings.prepared, work.cache, "float32")


__all__ = [
    "broken_scans_have_a_way_out",
    "build_volumes",
    "check_kind",
    "choose_device",
    "describe_work",
    "device_of_process",
    "find_model",
    "load_for_evaluation",
    "model_type_of",
    "start_processes",
    "start_single_process",
]
