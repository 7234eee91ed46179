import copy

import pytest
import tiny
import torch
from processes import run_processes
from torch import nn
from transformers import AutoBackbone

from med3dvlm import DCFormerBackbone, DCFormerModel
from med3dvlm.modeling_med3dvlm.modeling_dcformer import DCFormerBatchNorm3d


def tiny_model(**overrides):
    torch.manual_seed(0)
    return DCFormerModel(tiny.tiny_dcformer_config(**overrides)).eval()


def test_hidden_states_are_grids_of_every_stage():
    model = tiny_model()
    outputs = model(tiny.random_volumes(2), output_hidden_states=True)
    shapes = [tuple(hidden_state.shape) for hidden_state in outputs.hidden_states]
    assert shapes == [(2, 4, 8, 16, 24), (2, 6, 4, 8, 12), (2, 8, 2, 4, 6), (2, 10, 1, 2, 3), (2, 12, 1, 1, 2)]
    for stage, hidden_state in enumerate(outputs.hidden_states):
        assert tuple(hidden_state.shape[2:]) == model.config.grid(stage)
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    assert torch.allclose(outputs.pooler_output, outputs.last_hidden_state.flatten(2).mean(-1))


def test_hidden_states_are_returned_only_when_asked_for():
    assert tiny_model()(tiny.random_volumes(1)).hidden_states is None
    assert len(tiny_model(output_hidden_states=True)(tiny.random_volumes(1)).hidden_states) == 5
    assert len(tiny_model()(tiny.random_volumes(1), return_dict=False)) == 2


@pytest.mark.parametrize("image_size", [(17, 33, 50), (4, 4, 4), (96, 40, 8)])
def test_any_size_runs_and_the_grid_is_rounded_up(image_size):
    model = tiny_model(image_size=image_size)
    outputs = model(tiny.random_volumes(1, image_size=image_size), output_hidden_states=True)
    for stage, hidden_state in enumerate(outputs.hidden_states):
        assert tuple(hidden_state.shape[2:]) == model.config.grid(stage)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_each_branch_works_along_its_own_axis(axis):
    conv = tiny_model().stem.layers[0]
    name = ["depth", "height", "width"][axis - 2]
    impulse = torch.zeros(1, 1, 33, 33, 33)
    impulse[..., 16, 16, 16] = 1
    response = getattr(conv, f"conv_{name}")(impulse) - getattr(conv, f"conv_{name}")(torch.zeros_like(impulse))
    touched = response.abs().sum(1).nonzero()[:, 1:]  # positions (d, h, w) of the output grid
    assert {len(touched[:, other - 2].unique()) for other in (2, 3, 4) if other != axis} == {1}
    assert len(touched[:, axis - 2].unique()) == 1  # a kernel of 7 at stride 4 sees the voxel at one output position
    kernel = getattr(conv, f"conv_{name}").weight
    assert kernel.shape[axis] == 7 and kernel[0].numel() == 7


def test_stem_is_affine_at_inference():
    stem = tiny_model().stem
    first, second = tiny.random_volumes(1, seed=1), tiny.random_volumes(1, seed=2)
    mean = stem((first + second) / 2)
    torch.testing.assert_close(mean, (stem(first) + stem(second)) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, message",
    [((1, 32, 64, 96), r"\(batch_size, 1, depth, height, width\), got \(1, 32, 64, 96\)"), ((1, 3, 8, 8, 8), "got")],
)
def test_other_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(shape))


def test_fields_of_the_configuration_reach_the_layers():
    model = tiny_model(batch_norm_eps=0.1, batch_norm_momentum=0.3, mlp_ratio=3)
    norms = [module for module in model.modules() if isinstance(module, DCFormerBatchNorm3d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.1, 0.3)}
    for channels, stage in zip(model.config.hidden_sizes[1:], model.stages):
        for layer in stage.layers:
            assert layer.pwconv1.out_features == layer.pwconv2.in_features == 3 * channels


def test_initial_weights_are_those_of_pytorch():
    torch.manual_seed(0)
    model = DCFormerModel(tiny.tiny_dcformer_config(hidden_sizes=(64, 64, 64, 64, 64), layer_scale_init_value=1e-6))
    bound = 1 / (64 * 3) ** 0.5  # of a kernel of 3 over 64 channels: kaiming uniform with a = sqrt(5)
    weight = model.stem.layers[1].conv_depth.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (model.stages[0].layers[0].layer_scale == 1e-6).all()


def test_backbone_gives_the_named_stages_with_the_models_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    backbone = DCFormerBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage3"]).eval()
    volumes = tiny.random_volumes(1)
    hidden_states = model(volumes, output_hidden_states=True).hidden_states
    feature_maps = backbone(volumes).feature_maps
    assert torch.equal(feature_maps[0], hidden_states[1]) and torch.equal(feature_maps[1], hidden_states[3])
    assert backbone.channels == [6, 10]
    assert isinstance(AutoBackbone.from_config(tiny.tiny_dcformer_config()), DCFormerBackbone)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_neither_gradients_nor_running_statistics(use_reentrant):
    plain = tiny_model().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    volumes = tiny.random_volumes(2).requires_grad_()
    for model in (plain, checkpointed):
        model(volumes).last_hidden_state.square().sum().backward()
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), (_, theirs) in zip(plain.named_buffers(), checkpointed.named_buffers()):
        assert torch.equal(ours, theirs), name
    assert int(plain.stem.layers[0].norm_depth.num_batches_tracked) == 1


@pytest.mark.parametrize("is_fused", [None, False], ids=["fused", "modules"])
def test_frozen_encoder_keeps_its_statistics_and_its_output_in_training(is_fused):
    model = tiny_model(batch_norm_eps=0.1)  # far from the default of torch
    model.fused_inference = is_fused
    volumes = tiny.random_volumes(2)
    expected = model(volumes).last_hidden_state
    model.train().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model(volumes).last_hidden_state, expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.requires_grad_(True)
    assert not torch.allclose(model(volumes).last_hidden_state, expected)
    assert not torch.equal(
        model.stem.layers[0].norm_depth.running_mean, before["stem.layers.0.norm_depth.running_mean"]
    )


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_replica_of_data_parallel_gives_the_same(is_trained):
    """In a replica weights are plain attributes, so that it has no parameters."""
    model = tiny_model().train(is_trained)
    replica = copy.deepcopy(model)
    for module in replica.modules():
        weights = dict(module._parameters)
        module._parameters = {}
        for name, weight in weights.items():
            object.__setattr__(module, name, None if weight is None else weight.detach().clone().requires_grad_())
    volumes = tiny.random_volumes(2)
    with torch.set_grad_enabled(is_trained):
        assert not list(replica.parameters())
        torch.testing.assert_close(replica(volumes).last_hidden_state, model(volumes).last_hidden_state)


def test_every_weight_is_trained():
    model = tiny_model().train()
    model(tiny.random_volumes(2)).pooler_output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_save_and_load_is_exact_to_the_bit(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = DCFormerModel.from_pretrained(tmp_path)
    volumes = tiny.random_volumes(1)
    assert torch.equal(model(volumes).last_hidden_state, loaded(volumes).last_hidden_state)


def test_half_precision_input_is_cast_to_the_weights():
    model = tiny_model()
    assert model(tiny.random_volumes(1).half()).last_hidden_state.dtype == torch.float32
    assert model.bfloat16()(tiny.random_volumes(1)).last_hidden_state.dtype == torch.bfloat16


SMALL_SIZE = (12, 20, 36)


def train_step(model, volumes, share=1.0):
    """Outputs, gradients and statistics of a step in training; `share` is what data parallelism divides the loss by."""
    outputs = model(volumes).pooler_output
    (share * outputs.pow(3).sum()).backward()
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return outputs.detach(), gradients, dict(model.named_buffers())


def layer_step(norm, values, cotangents, autocast=False):
    values = values.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = norm(values)
    outputs.backward(cotangents)
    return outputs.detach(), values.grad, norm.running_mean, norm.running_var


def layer_inputs(dtype):
    """7 samples: a channel of a usual scale, and in float32 one far from zero, where unstable formulas fail."""
    generator = torch.Generator().manual_seed(0)
    values, cotangents = (torch.randn(7, 2, 3, 4, 5, generator=generator) for _ in range(2))
    offsets = torch.tensor([0.5, 3000.0 if dtype == torch.float32 else 3.0])
    return (values + offsets.view(2, 1, 1, 1)).to(dtype), cotangents.to(dtype)


def normalise_on_a_share(rank, batch_sizes, result):
    torch.manual_seed(0)
    own = slice(sum(batch_sizes[:rank]), sum(batch_sizes[: rank + 1]))
    outcomes = {}
    for checkpointing in (False, True):
        model = tiny_model(sync_batch_norm=True).double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model = nn.parallel.DistributedDataParallel(model)
        volumes = tiny.random_volumes(sum(batch_sizes), image_size=SMALL_SIZE)[own].double()
        outcomes[checkpointing] = train_step(model, volumes, share=len(batch_sizes))
    for dtype in (torch.float32, torch.bfloat16):
        values, cotangents = layer_inputs(dtype)
        norm = DCFormerBatchNorm3d(2, synchronised=True)
        outcomes[dtype] = layer_step(norm, values[own], cotangents[own], autocast=dtype == torch.bfloat16)
    if rank == 0:  # alone: what exchanges anything would wait for the others until the test fails
        values = torch.rand(2, 2, 3, 4, 5)
        norm.eval()(values)
        norm.train().requires_grad_(False)(values)
        DCFormerBatchNorm3d(2)(values)
    torch.save(outcomes, f"{result}{rank}")


@pytest.mark.parametrize("batch_sizes", [pytest.param((2, 1), marks=pytest.mark.slow), (1, 3, 2)], ids=str)
def test_synchronised_statistics_are_those_of_one_process_with_all_batches(batch_sizes, tmp_path):
    run_processes(normalise_on_a_share, len(batch_sizes), tmp_path, batch_sizes, tmp_path / "result")
    results = [torch.load(tmp_path / f"result{rank}") for rank in range(len(batch_sizes))]
    volumes = tiny.random_volumes(sum(batch_sizes), image_size=SMALL_SIZE).double()
    outputs, gradients, buffers = train_step(tiny_model().double().train(), volumes)
    for checkpointing in (False, True):
        torch.testing.assert_close(torch.cat([result[checkpointing][0] for result in results]), outputs)
        for result in results:
            for kind, expected in zip(result[checkpointing][1:], (gradients, buffers), strict=True):
                for name, value in expected.items():
                    torch.testing.assert_close(kind[name], value, msg=lambda m, n=name: f"{n}: {m}")
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        values, cotangents = (tensor[: sum(batch_sizes)] for tensor in layer_inputs(dtype))
        exact = layer_step(nn.BatchNorm3d(2).double(), values.double(), cotangents.double())
        ours = [torch.cat([result[dtype][index] for result in results]) for index in (0, 1)]
        for value, expected in zip(ours, exact[:2], strict=True):
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), expected, atol=tolerance, rtol=tolerance)
        for result in results:
            for statistic, expected in zip(result[dtype][2:], exact[2:], strict=True):
                assert statistic.dtype == torch.float32
                torch.testing.assert_close(statistic.double(), expected, atol=1e-5, rtol=1e-5)


def test_synchronised_statistics_change_nothing_in_one_process():
    plain, synchronised = tiny_model().train(), tiny_model(sync_batch_norm=True).train()
    volumes = tiny.random_volumes(2)
    for _ in range(2):
        assert torch.equal(plain(volumes).last_hidden_state, synchronised(volumes).last_hidden_state)
        plain.eval()
        synchronised.eval()
