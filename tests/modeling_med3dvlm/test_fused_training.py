"""Training by blocks against the modules: the same outputs, gradients and running statistics."""

import copy

import pytest
import tiny
import torch

from med3dvlm.modeling_med3dvlm import fused_training
from med3dvlm.modeling_med3dvlm.modeling_dcformer import DCFormerDecomposedConv, DCFormerModel


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
