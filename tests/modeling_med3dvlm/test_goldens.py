"""Outputs and gradients of the original implementation, recorded on deterministic weights."""

import golden_cases
import pytest
import torch


@pytest.fixture(autouse=True)
def as_many_threads_as_recorded():
    """The order of sums depends on the number of threads, and the limits leave little beside the rounding of one order."""
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(number)


def check(comparisons):
    exceeded = [comparison for comparison in comparisons if not comparison.relative <= comparison.limit]
    assert not exceeded, exceeded


def encoder(variant, *marks):
    missing = golden_cases.find_golden(f"dcformer_{variant}") is None
    skip = pytest.mark.skipif(missing, reason=f"the golden dcformer_{variant} is not in this checkout")
    return pytest.param(variant, marks=[skip, *marks])


@pytest.mark.parametrize("variant", [encoder(variant) for variant in golden_cases.ENCODERS])
def test_every_stage_of_the_encoder_equals_the_original(variant):
    check(golden_cases.measure_encoder(variant))


def test_training_step_of_the_encoder_equals_the_original():
    check(golden_cases.measure_training_step())


def test_vit3d_equals_the_original():
    check(golden_cases.measure_vit3d())


@pytest.mark.parametrize("name", ["linear", "mlp", "mhsa", "low_high_mlp", "mixer", "mixer_depth1"])
def test_projector_equals_the_original(name):
    check(golden_cases.measure_projector(name))


@pytest.mark.parametrize("kind", ["sigmoid", "nce"])
def test_dual_encoder_equals_the_original(kind):
    check(golden_cases.measure_dual_encoder(kind))


def test_dual_encoder_on_two_ranks_equals_the_original():
    check(golden_cases.measure_distributed_dual_encoder())


def test_vision_language_model_equals_the_original():
    check(golden_cases.measure_vlm())
