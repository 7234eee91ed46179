import copy

import pytest
import tiny
import torch
from torch import nn

from med3dvlm import Vit3DModel


def tiny_model(**overrides):
    torch.manual_seed(0)
    return Vit3DModel(tiny.tiny_vit3d_config(**overrides)).eval()


def test_tokens_are_patches_in_raster_order_with_depth_slowest():
    model = tiny_model()
    outputs = model(tiny.random_volumes(2), output_hidden_states=True)
    assert outputs.last_hidden_state.shape == (2, 2 * 2 * 3, 12)
    assert len(outputs.hidden_states) == 4
    volume = torch.zeros(1, 1, *tiny.IMAGE_SIZE)
    changed = volume.clone()
    changed[..., 16:, :32, 64:] = torch.rand(16, 32, 32)  # the patch at (d, h, w) = (1, 0, 2)
    difference = (model.embeddings(changed) - model.embeddings(volume)).abs().sum(-1)[0, 1:]
    assert difference.nonzero().flatten().tolist() == [(1 * 2 + 0) * 3 + 2]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_plain_formula(attention):
    model = tiny_model(attn_implementation=attention)
    layer = model.layers[0].attention
    hidden_states = torch.randn(2, 7, 12)
    query, key, value = (
        projection(hidden_states).view(2, 7, 2, 5).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    weights = torch.softmax(query @ key.transpose(2, 3) / 5**0.5, dim=-1)
    expected = layer.out_proj((weights @ value).transpose(1, 2).reshape(2, 7, 10))
    torch.testing.assert_close(layer(hidden_states), expected)


def test_checkpointing_keeps_gradients():
    plain = tiny_model().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(tiny.random_volumes(1)).last_hidden_state.square().sum().backward()
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


class QuantisedLinear(nn.Linear):
    """A linear map that keeps whole numbers of one byte instead of its weight, as quantisers do."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.scale = linear.weight.detach().abs().max() / 127
        stored = (linear.weight.detach() / self.scale + 128).round().to(torch.uint8)
        self.weight, self.bias = nn.Parameter(stored, requires_grad=False), linear.bias

    def forward(self, states):
        return nn.functional.linear(states, (self.weight.to(states.dtype) - 128) * self.scale, self.bias)


def test_quantised_patch_weights_do_not_decide_the_precision_of_voxels():
    model, volumes = tiny_model(), tiny.random_volumes(1)
    expected = model(volumes).last_hidden_state
    model.embeddings.projection = QuantisedLinear(model.embeddings.projection)
    torch.testing.assert_close(model(volumes).last_hidden_state, expected, atol=0.05, rtol=0.05)


def test_save_and_load_is_exact_to_the_bit(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = Vit3DModel.from_pretrained(tmp_path)
    volumes = tiny.random_volumes(1)
    assert torch.equal(model(volumes).last_hidden_state, loaded(volumes).last_hidden_state)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"`image_size` \(32, 64, 96\), got \(1, 1, 32, 64, 64\)"):
        tiny_model()(torch.zeros(1, 1, 32, 64, 64))
