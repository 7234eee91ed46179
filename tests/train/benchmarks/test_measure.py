import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from med3dvlm import DCFormerModel
from med3dvlm.train.benchmarks.measure import (
    describe_machine,
    encoder_work,
    measure_limits,
    roofline_seconds,
    time_in_turns,
    timing_of,
)


CPU = torch.device("cpu")


def test_functions_are_timed_in_turns_after_one_call_each():
    calls = []
    functions = {
        "slow": lambda: (calls.append("slow"), time.sleep(0.02)),
        "quick": lambda: calls.append("quick"),
    }
    timings = time_in_turns(functions, CPU, runs=3)
    assert calls == ["slow", "quick"] * 4
    assert timings["slow"].lower >= 0.02 > timings["quick"].median


def test_median_and_quartiles():
    timing = timing_of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.lower, timing.median, timing.upper) == (2.0, 3.0, 4.0)
    assert timing_of([2.0]).median == 2.0


PEAKS = """
import torch
from med3dvlm.train.benchmarks.measure import peak_memory

SIZE = 64 * 2**20

def twice_one_after_the_other():
    for _ in range(2):
        torch.ones(SIZE, dtype=torch.uint8)

def two_at_once():
    kept = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(2)]
    assert len(kept) == 2

print(*(peak_memory(function, torch.device("cpu")) / SIZE for function in (twice_one_after_the_other, two_at_once)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are known on Linux only")
def test_peak_memory_is_what_a_call_needs_at_once():
    # In a process of its own, as the benchmarks are: one that has run other tests has threads that allocate meanwhile.
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    assert [float(peak) for peak in done.stdout.split()] == pytest.approx([1, 2], rel=0.1)


def test_work_counts_the_multiplications_of_the_encoder():
    config = tiny.tiny_dcformer_config()
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        if isinstance(module, torch.nn.Conv3d):
            positions = output.numel() // output.shape[1]
            counted += 2 * module.weight.numel() * positions
        elif isinstance(module, torch.nn.Linear):
            counted += 2 * module.weight.numel() * (output.numel() // output.shape[-1])

    model = DCFormerModel(config).eval()
    for module in model.stages.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(tiny.random_volumes(2))
    work = {name: operations for name, operations, _ in encoder_work(config, 2, tiny.IMAGE_SIZE, 4)}
    stages = sum(operations for name, operations in work.items() if not name.startswith("stem"))
    positions = [2 * torch.Size(config.grid(stage)).numel() for stage in range(5)]
    # Three middle taps of the depthwise convolutions count as one.
    shared = sum(4 * positions[stage] * config.hidden_sizes[stage] * config.depths[stage] for stage in range(1, 5))
    assert stages == counted - shared
    assert work["stem 3"] == 2 * positions[0] * 7 * 4 * 4
    assert work["stem 1 and 2"] == 2 * positions[0] * 7 * 20 * 4


def test_roofline_is_the_longer_of_arithmetic_and_traffic():
    limits = {"matmul": 100.0, "convolution": 200.0, "copy": 10.0}
    assert roofline_seconds([("a", 400.0, 10.0), ("b", 200.0, 50.0)], limits) == 2.0 + 5.0


def test_limits_are_measured_and_the_machine_described():
    limits = measure_limits(CPU, torch.float32, runs=1)
    assert all(limits[name] > 1e6 for name in ("matmul", "convolution", "copy"))
    machine = describe_machine(CPU)
    assert machine["device"] == "cpu" and machine["threads"] == torch.get_num_threads()
    assert not any("/" in str(value) for value in machine.values())
