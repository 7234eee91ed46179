"""Outputs and gradients of the original implementation, recorded on deterministic weights."""

import re

import golden_cases
import pytest
import torch

from med3dvlm import DCFormerConfig, DCFormerModel
from med3dvlm.modeling_med3dvlm.original_layout import encoder_layout


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


def test_readme_says_where_each_golden_is_from():
    folder = golden_cases.FOLDERS[0]
    text = (folder / "README.md").read_text()
    assert set(re.findall(r"`([a-z]\w*\.json)`", text)) == {path.name for path in folder.glob("*.json")}
    assert "commit `cbbd6335a64370f829710a1412e46afc68f243ff`" in text


VARIANTS = [variant for variant in golden_cases.ENCODERS if variant != "small_full"]


@pytest.mark.parametrize("variant", golden_cases.ENCODERS)
def test_every_stage_of_the_encoder_equals_the_original(variant):
    if variant not in VARIANTS and golden_cases.find_golden(f"dcformer_{variant}") is None:
        pytest.skip(f"the golden dcformer_{variant} is not in this checkout")
    check(golden_cases.measure_encoder(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_of_every_size_are_those_of_the_original(variant):
    golden = golden_cases.find_golden(f"dcformer_{variant}")
    with torch.device("meta"):
        model = DCFormerModel(DCFormerConfig.from_variant(variant))
        theirs = {name: torch.empty(shape) for name, shape in golden.meta["layout"].items()}
    converted = golden_cases.converted_state(theirs, encoder_layout())
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in converted.items()}
    assert model.num_parameters() == golden.meta["parameters"]


def test_a_golden_without_its_arrays_is_compared_by_what_its_outputs_amount_to(tmp_path, monkeypatch, capsys):
    (tmp_path / "dcformer_nano.json").write_text((golden_cases.FOLDERS[0] / "dcformer_nano.json").read_text())
    monkeypatch.setattr(golden_cases, "FOLDERS", (tmp_path,))
    check(golden_cases.measure_encoder("nano"))
    golden = golden_cases.find_golden("dcformer_nano")
    assert not golden.arrays
    spec = golden.meta["outputs"]["hidden_4"]
    values = torch.randn(spec["shape"])
    assert golden_cases.compare(golden, "hidden_4", values).relative > 0.1
    with pytest.raises(AssertionError, match=r"hidden_4: shape"):
        golden_cases.compare(golden, "hidden_4", values[:1])
    next(golden_cases.measure_all())
    assert "dcformer_nano: the arrays are not in this checkout" in capsys.readouterr().out
    (tmp_path / "dcformer_nano.json").unlink()
    monkeypatch.setattr(golden_cases, "measure_training_step", lambda: iter(["what comes after the encoders"]))
    assert next(golden_cases.measure_all()) == "what comes after the encoders"
    assert "dcformer_large: not in this checkout" in capsys.readouterr().out


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
