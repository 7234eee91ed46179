"""Times in turns, peak memory, and what the machine can do at most."""

import ctypes
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...configuration.configuration_dcformer import DCFormerConfig
from ..processes import count_usable_cores


Function = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls: the median, and the quartiles around it."""

    median: float
    lower: float
    upper: float


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(functions: Mapping[str, Function], device: torch.device, runs: int = 7) -> dict[str, Timing]:
    """
    Times functions one after the other, again and again, so that whatever else the machine does concerns all of them.

    Args:
        functions (`Mapping[str, Function]`):
            What to time, by name. Each is called once before, for whatever happens the first time only.
        device (`torch.device`):
            Where they work.
        runs (`int`, *optional*, defaults to 7):
            Calls of each.

    Returns:
        `dict[str, Timing]`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(runs):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: timing_of(values) for name, values in seconds.items()}


def timing_of(seconds: list[float]) -> Timing:
    """Median and quartiles."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0])
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper)


def peak_memory(function: Function, device: torch.device) -> int | None:
    """
    Bytes that a call needs at its peak beyond what was there before: of the device, or of the process on a CPU. `None`
    where the system does not tell, which is everywhere but on Linux.
    """
    function()  # what the first call keeps for later ones is not of one call
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}.")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know to compare figures: processor, threads and versions, no names or paths."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    machine = {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": count_usable_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
    return machine


def measure_limits(device: torch.device, dtype: torch.dtype, runs: int = 5) -> dict[str, float]:
    """
    What this machine reaches at best: arithmetic per second of a large matrix product and of a 3 x 3 convolution of
    pictures with channels last, and bytes per second read and written by a copy too large for any cache.

    Returns:
        `dict` with `matmul` and `convolution` (operations per second) and `copy` (bytes per second).
    """
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    pictures = torch.randn(8, 64, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    source = torch.zeros(2**26, device=device, dtype=torch.float32)
    target = torch.ones_like(source)
    with torch.no_grad():
        timings = time_in_turns(
            {
                "matmul": lambda: left @ right,
                "convolution": lambda: torch.nn.functional.conv2d(pictures, kernel, padding=1),
                "copy": lambda: target.copy_(source),
            },
            device,
            runs,
        )
    amounts = {"matmul": 2 * size**3, "convolution": 2 * 8 * 64**4 * 9, "copy": 2 * source.nbytes}
    return {name: amount / timings[name].lower for name, amount in amounts.items()}


def encoder_work(
    config: DCFormerConfig, batch_size: int, image_size: tuple[int, int, int], itemsize: int
) -> list[tuple[str, float, float]]:
    """
    What the encoder has to do, however it is arranged: for each part a name, arithmetic operations (a multiplication and
    an addition count as two) and bytes read and written once.

    The stem counts with its first two layers as one map of the voxels under their crosses, the least known.
    """
    grids = [
        [math.ceil(size / stride) for size in image_size] for stride in (4 * 2**i for i in range(len(config.depths)))
    ]
    counts = [batch_size * math.prod(grid) for grid in grids]
    width, positions = config.hidden_sizes[0], counts[0]
    voxels = config.num_channels * (3 * (config.kernel_sizes[0] - 1) + 1) + 1
    work = [
        ("stem 1 and 2", 2.0 * positions * 7 * voxels * width, positions * (voxels + width) * itemsize),
        ("stem 3", 2.0 * positions * 7 * width**2, 2.0 * positions * width * itemsize),
        ("stem 4", 2.0 * positions * 7 * width**2, 2.0 * positions * width * itemsize),
    ]
    for stage in range(1, len(config.depths)):
        channels, below, own = config.hidden_sizes[stage], config.hidden_sizes[stage - 1], counts[stage]
        size, inner = config.kernel_sizes[stage], config.mlp_ratio * channels
        work.append(
            (f"pooling {stage}", 2.0 * own * below * channels, (counts[stage - 1] * below + own * channels) * itemsize)
        )
        blocks = config.depths[stage]
        operations = 2.0 * own * channels * (3 * size - 2) + 4.0 * own * channels * inner
        traffic = (4.0 * own * channels + 2 * channels * inner) * itemsize
        work.append((f"stage {stage}", blocks * operations, blocks * traffic))
    return work


def roofline_seconds(work: list[tuple[str, float, float]], limits: Mapping[str, float]) -> float:
    """The least time for this work: of each part the longer of its arithmetic and its traffic, at the measured limits."""
    peak = max(limits["matmul"], limits["convolution"])
    return sum(max(operations / peak, traffic / limits["copy"]) for _, operations, traffic in work)


__all__ = [
    "Timing",
    "describe_machine",
    "encoder_work",
    "measure_limits",
    "peak_memory",
    "roofline_seconds",
    "synchronise",
    "time_in_turns",
    "timing_of",
]
