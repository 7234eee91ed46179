"""Training by blocks against the modules: the same outputs, gradients and running statistics."""

import copy

import pytest
import tiny
import torch

from med3dvlm.modeling_med3dvlm import fused_training
from med3dvlm.modeling_med3dvlm.fused_training import statistics_of_batch
from med3dvlm.modeling_med3dvlm.modeling_dcformer import DCFormerBatchNorm3d, DCFormerDecomposedConv, DCFormerModel


def train_once(model: DCFormerModel, volumes: torch.Tensor) -> list[torch.Tensor]:
    hidden_states = list(model(volumes, output_hidden_states=True).hidden_states)
    sum(
        (state * torch.linspace(-1, 1, state.numel(), dtype=state.dtype).view_as(state)).sum()
        for state in hidden_states
    ).backward()
    return hidden_states


@pytest.mark.parametrize("block_bytes", [2**10, 2**23])
def test_a_training_step_equals_the_modules(monkeypatch, block_bytes):
    monkeypatch.setattr(fused_training, "BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    ours = DCFormerModel(tiny.tiny_dcformer_config()).double().train()
    modules = copy.deepcopy(ours)
    volumes, same_volumes = (tiny.random_volumes(2).double().requires_grad_() for _ in range(2))

    fused = train_once(ours, volumes)
    monkeypatch.setattr(DCFormerDecomposedConv, "fused_training", False)
    expected = train_once(modules, same_volumes)

    assert torch.equal(volumes, same_volumes) and not torch.equal(fused[0], expected[0])  # two ways
    for own, other in zip([*fused, volumes.grad], [*expected, same_volumes.grad]):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    for (name, own), other in zip(ours.named_parameters(), modules.parameters()):
        assert own.grad is not None and other.grad is not None, name
        torch.testing.assert_close(
            own.grad, other.grad, rtol=1e-7, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    for (name, own), other in zip(ours.named_buffers(), modules.buffers()):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_modules_with_hooks_are_called():
    model = DCFormerModel(tiny.tiny_dcformer_config()).train()
    called = []
    model.stem.layers[1].conv_depth.register_forward_hook(lambda *args: called.append(1))
    model(tiny.random_volumes(2))
    assert called == [1]


def test_statistics_of_many_rows_lose_no_digits():
    torch.manual_seed(0)
    rows = torch.randn(300_000, 3) * torch.tensor([1.0, 0.1, 2.0]) + torch.tensor([0.0, 10.0, -3.0])
    norm = DCFormerBatchNorm3d(3)
    bias = torch.tensor([1.0, 2.0, 3.0])
    mean, variance = statistics_of_batch(rows, norm, bias)
    exact = rows.double()
    torch.testing.assert_close(mean.double(), exact.mean(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), exact.var(dim=0, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * (mean + bias))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * exact.var(dim=0).float())


def changed(change):
    """Two layers of the same weights after `change`, the second of which is made to call its modules."""
    torch.manual_seed(0)
    ours = DCFormerDecomposedConv(tiny.tiny_dcformer_config(), 2, 2, kernel_size=3)
    change(ours)
    modules = copy.deepcopy(ours)
    modules.fused_training = False
    return ours, modules


def set_eps(layer):
    layer.norm_width.eps = 1.0


def set_padding_mode(layer):
    layer.conv_height.padding_mode = "replicate"


def drop_bias(layer):
    layer.conv_depth.bias = None


def average_all_batches(layer):
    for norm in (layer.norm_depth, layer.norm_height, layer.norm_width):
        norm.momentum = None


def keep_no_statistics(layer):
    for norm in (layer.norm_depth, layer.norm_height, layer.norm_width):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


@pytest.mark.parametrize("change", [set_eps, set_padding_mode, drop_bias, average_all_batches, keep_no_statistics])
def test_a_layer_that_was_changed_gives_what_its_modules_give(change):
    ours, modules = changed(change)
    for seed in range(2):
        volumes = torch.randn(2, 2, 5, 6, 7, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(ours(volumes), modules(volumes), rtol=1e-5, atol=1e-5)
    for own, other in zip(ours.buffers(), modules.buffers()):
        torch.testing.assert_close(own, other)


def test_under_autocast_a_layer_calls_its_modules():
    """To the bit: autocast chooses the precision of each module, which the shorter way would not follow."""
    results = []
    for layer in changed(lambda layer: None):
        volumes = torch.randn(2, 2, 5, 6, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = layer(volumes)
        outputs.float().square().sum().backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([outputs, volumes.grad, *gradients, *layer.buffers()])
    assert results[0][0].dtype == torch.bfloat16
    for own, other in zip(*results):
        assert own.dtype == other.dtype and torch.equal(own, other)


def test_a_depthwise_layer_of_one_channel_has_all_its_taps():
    torch.manual_seed(0)
    ours = DCFormerDecomposedConv(tiny.tiny_dcformer_config(), 1, 1, kernel_size=5)
    modules = copy.deepcopy(ours)
    modules.fused_training = False
    volumes = torch.randn(2, 1, 6, 7, 8)
    for layer in (ours, modules):
        layer(volumes).square().sum().backward()
    torch.testing.assert_close(ours(volumes), modules(volumes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.conv_width.weight.grad, modules.conv_width.weight.grad, rtol=1e-3, atol=1e-3)


def test_gradients_of_gradients_are_refused_with_the_switch_that_gives_them():
    model = DCFormerModel(tiny.tiny_dcformer_config()).train()
    loss = model(tiny.random_volumes(2)).pooler_output.square().sum()
    with pytest.raises(NotImplementedError, match="fused_training = False"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_gradients_are_tensors_of_their_own():
    model = DCFormerModel(tiny.tiny_dcformer_config()).train()
    loss = model(tiny.random_volumes(2)).pooler_output.square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert len({gradient.data_ptr() for gradient in gradients}) == len(gradients)
