import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from med3dvlm import DCFormerBackbone, DCFormerModel
from med3dvlm.modeling_med3dvlm import fused_dcformer, modeling_dcformer
from med3dvlm.modeling_med3dvlm.fused_dcformer import (
    FoldedConv,
    PaddedGrid,
    convolve,
    cross_of_taps,
    fused_hidden_states,
    max_pool,
    pool_whole,
    stem_in_blocks,
    stem_in_convolutions,
)


ONE_STAGE = {"hidden_sizes": (4, 6), "depths": (1, 1), "kernel_sizes": (7, 5)}  # tracing takes long


def trained_like(model):
    """Statistics and weights of normalisation far from their initial 0 and 1, which would hide faults in folding."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.2, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def tiny_model(model_class=DCFormerModel, **overrides):
    torch.manual_seed(0)
    return trained_like(model_class(tiny.tiny_dcformer_config(**overrides)))


def plain_hidden_states(model, volumes):
    plain = copy.deepcopy(model)
    plain.fused_inference = False
    return plain(volumes, output_hidden_states=True).hidden_states


def largest_error(ours, expected):
    assert len(ours) == len(expected)
    for own, other in zip(ours, expected):
        assert own.shape == other.shape and own.dtype == other.dtype
    return max(float((own - other).abs().max() / other.abs().max()) for own, other in zip(ours, expected))


@pytest.fixture
def calls(monkeypatch):
    """How often the fused path was taken, and whether in blocks."""
    taken = []

    def counted(model, pixel_values, in_blocks):
        taken.append(in_blocks)
        return fused_hidden_states(model, pixel_values, in_blocks)

    monkeypatch.setattr(modeling_dcformer, "fused_hidden_states", counted)
    return taken


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize(
    "batch_size, image_size",
    [(1, (17, 33, 50)), (3, (16, 20, 36)), (2, (1, 1, 1)), (1, (4, 4, 4)), (2, (3, 6, 70)), (1, (70, 2, 5))],
)
def test_fused_path_equals_the_modules(in_blocks, batch_size, image_size):
    model = tiny_model().double()
    volumes = tiny.random_volumes(batch_size, image_size=image_size).double()
    with torch.no_grad():
        ours = fused_hidden_states(model, volumes, in_blocks)
        assert largest_error(ours, plain_hidden_states(model, volumes)) < 1e-12


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        {"num_channels": 3},
        {"kernel_sizes": (1, 3, 1, 5, 7)},
        {"kernel_sizes": (11, 3, 3, 3, 3)},
        {**ONE_STAGE, "hidden_act": "gelu_pytorch_tanh"},
        {"batch_norm_eps": 0.1},
    ],
    ids=str,
)
def test_fused_path_follows_the_configuration(in_blocks, overrides):
    model = tiny_model(**overrides).double()
    volumes = torch.rand(2, overrides.get("num_channels", 1), 10, 21, 30, dtype=torch.float64)
    with torch.no_grad():
        ours = fused_hidden_states(model, volumes, in_blocks)
        assert largest_error(ours, plain_hidden_states(model, volumes)) < 1e-12


def test_fused_path_in_many_small_blocks(monkeypatch):
    model, volumes = tiny_model().double(), tiny.random_volumes(2).double()
    with torch.no_grad():
        expected = plain_hidden_states(model, volumes)
        for size in (1, 1000, 5000):
            monkeypatch.setattr(fused_dcformer, "BLOCK_BYTES", size)
            small = volumes[:1, :, :8, :12, :16] if size == 1 else volumes
            reference = plain_hidden_states(model, small) if size == 1 else expected
            assert largest_error(fused_hidden_states(model, small, True), reference) < 1e-12


@pytest.mark.parametrize("in_blocks", [True, False])
def test_error_in_float32_is_that_of_rounding(in_blocks):
    model = tiny_model(hidden_sizes=(16, 24, 32, 48, 64))
    volumes = tiny.random_volumes(1)
    with torch.no_grad():
        assert (
            largest_error(fused_hidden_states(model, volumes, in_blocks), plain_hidden_states(model, volumes)) < 2e-6
        )


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_about_as_exact_as_the_modules(in_blocks, autocast):
    model = tiny_model(hidden_sizes=(16, 24, 32, 48, 64))
    volumes = tiny.random_volumes(1).bfloat16().float()
    if not autocast:
        model = model.bfloat16()
    with torch.no_grad():
        exact = plain_hidden_states(copy.deepcopy(model).double(), volumes.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, theirs = fused_hidden_states(model, volumes, in_blocks), plain_hidden_states(model, volumes)
    assert [own.dtype for own in ours] == [other.dtype for other in theirs]
    for own, other, truth in zip(ours, theirs, exact):
        assert (own - truth).abs().max() < 2 * (other - truth).abs().max() + 1e-3 * truth.abs().max()
        assert (own - truth).square().mean() < 2.5 * (other - truth).square().mean()


def test_parts_equal_their_modules():
    model = tiny_model().double()
    values = torch.randn(2, 5, 6, 7, 4, dtype=torch.float64)
    with torch.no_grad():
        grid = values.movedim(-1, 1)
        layer = model.stem.layers[1]
        torch.testing.assert_close(convolve(values, FoldedConv(layer), torch.float64).movedim(-1, 1), layer(grid))
        for pool in (max_pool, pool_whole):
            assert torch.equal(pool(values).movedim(-1, 1), model.stages[0].pool(grid))
        volumes = tiny.random_volumes(1, image_size=(9, 12, 31)).double()
        for stem in (stem_in_blocks, stem_in_convolutions):
            torch.testing.assert_close(
                stem(model.stem, volumes, torch.float64).movedim(-1, 1), model.stem(volumes), atol=1e-12, rtol=1e-12
            )


def test_neighbours_of_a_padded_grid_are_shifted_rows():
    shape = (2, 3, 4, 5)
    grid = PaddedGrid(shape, torch.full((PaddedGrid.rows_needed(shape), 1), float("nan")))
    values = torch.rand(*shape, 1)
    grid.values.copy_(values)
    grid.clear_padding()
    for offsets in cross_of_taps(3):
        moved = PaddedGrid(shape, torch.zeros(PaddedGrid.rows_needed(shape), 1))
        moved.shifted(0, moved.num_rows, (0, 0, 0)).copy_(grid.shifted(0, grid.num_rows, offsets))
        padded = nn.functional.pad(values, (0, 0, 1, 1, 1, 1, 1, 1))
        spans = (slice(1 + offset, 1 + offset + size) for offset, size in zip(offsets, shape[1:]))
        assert torch.equal(moved.values, padded[(slice(None), *spans)])


@pytest.mark.parametrize("model_class", [DCFormerModel, DCFormerBackbone])
def test_fused_path_is_taken_at_inference(calls, model_class):
    model = tiny_model(model_class)
    with torch.no_grad():
        model(tiny.random_volumes(1))
    with torch.inference_mode():
        model(tiny.random_volumes(1))
    assert calls == [True, True]


def test_frozen_encoder_takes_the_fused_path_in_training(calls):
    model = tiny_model().train().requires_grad_(False)
    outputs = model(tiny.random_volumes(1))
    assert calls == [True] and not outputs.last_hidden_state.requires_grad


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: setattr(model, "fused_inference", False),
        lambda model: model.train(),
        lambda model: model.stages[1].layers[0].dwconv.norm_width.train(),
        lambda model: model.stem.layers[2].register_forward_hook(lambda *args: None),
        lambda model: model.stages[0].register_forward_pre_hook(lambda *args: None),
        lambda model: setattr(model.stem, "forward", model.stem.forward),
        lambda model: setattr(model.stages[0].layers[0], "pwconv1", nn.Sequential(model.stages[0].layers[0].pwconv1)),
        lambda model: model.half(),
        lambda model: setattr(model.stem, "double_", model.stages[0].layers[0].double()),
    ],
    ids=["switch", "train", "norm", "hook", "prehook", "forward", "adapter", "half", "mixed"],
)
def test_modules_are_called_where_the_fused_path_might_differ(calls, prepare):
    model = tiny_model()
    prepare(model)
    with torch.no_grad():
        assert not (model.fused_inference is None and model.can_be_fused(tiny.random_volumes(1)))
        if not any(parameter.dtype == torch.float64 for parameter in model.parameters()):
            model(tiny.random_volumes(2))
    assert calls == []


def test_gradients_flow_in_eval_mode(calls):
    model = tiny_model()
    model(tiny.random_volumes(1)).pooler_output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False)
    volumes = tiny.random_volumes(1).requires_grad_()
    model(volumes).pooler_output.sum().backward()
    assert volumes.grad.abs().sum() > 0 and calls == []


def test_fused_path_follows_changed_weights(calls):
    model, other = tiny_model(), tiny_model()
    volumes = tiny.random_volumes(1)
    with torch.no_grad():
        model(volumes)
        for parameter in other.parameters():
            parameter.add_(0.1)
        other.stem.layers[1].norm_depth.running_var.mul_(2)
        expected = plain_hidden_states(other, volumes)
        model.load_state_dict(other.state_dict())
        assert largest_error(model(volumes, output_hidden_states=True).hidden_states, expected) < 2e-6
        model.stem.layers[0].conv_depth.weight.zero_()
        assert largest_error(model(volumes, output_hidden_states=True).hidden_states, expected) > 1e-3
    assert calls == [True] * 3


def test_wrong_shapes_are_refused_on_the_fused_path():
    with torch.no_grad(), pytest.raises(ValueError, match="depth, height, width"):
        tiny_model()(torch.zeros(1, 2, 8, 8, 8))


def test_results_do_not_share_memory_with_the_input_or_each_other():
    model, volumes = tiny_model(), tiny.random_volumes(1)
    kept = volumes.clone()
    with torch.no_grad():
        first = model(volumes, output_hidden_states=True).hidden_states
        copies = [hidden_state.clone() for hidden_state in first]
        model(tiny.random_volumes(1, seed=5))
    assert torch.equal(volumes, kept)
    assert all(torch.equal(hidden_state, copied) for hidden_state, copied in zip(first, copies))
    assert len({hidden_state.untyped_storage().data_ptr() for hidden_state in first}) == len(first)


def test_exported_program_is_fused_and_follows_the_size_of_volumes(calls):
    model = tiny_model(**ONE_STAGE)
    small, other = tiny.random_volumes(2, image_size=(12, 20, 36)), tiny.random_volumes(2, image_size=(17, 40, 24))
    size = dict.fromkeys((2, 3, 4), torch.export.Dim.AUTO)
    with torch.no_grad():
        program = torch.export.export(model, (small,), dynamic_shapes={"pixel_values": size}).module()
        assert calls == [False]
        for volumes in (small, other):
            expected = plain_hidden_states(model, volumes)[-1]
            assert largest_error([program(volumes).last_hidden_state], [expected]) < 2e-6


def test_graph_is_whole_and_equal_under_torch_compile(calls):
    model, volumes = tiny_model(**ONE_STAGE), tiny.random_volumes(1, image_size=(9, 20, 36))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        outputs = compiled(volumes, output_hidden_states=True).hidden_states
        assert largest_error(outputs, plain_hidden_states(model, volumes)) < 2e-6


@pytest.mark.parametrize("is_supported", [True, False])
def test_a_gpu_says_itself_whether_it_multiplies_bfloat16(is_supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {"including_emulation": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: asked.update(given) or is_supported)
    assert fused_dcformer.multiplies_bfloat16.__wrapped__("cuda") is is_supported
    assert asked == {"including_emulation": False}


def test_a_torch_without_the_private_question_multiplies_no_bfloat16_on_cpus(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not fused_dcformer.multiplies_bfloat16.__wrapped__("cpu")


def test_a_torch_without_onednn_multiplies_no_bfloat16_on_cpus(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: pytest.fail("not in such builds"))
    fused_dcformer.multiplies_bfloat16.cache_clear()
    try:
        assert not fused_dcformer.multiplies_bfloat16("cpu") and fused_dcformer.multiplies_bfloat16("cuda")
    finally:
        fused_dcformer.multiplies_bfloat16.cache_clear()
