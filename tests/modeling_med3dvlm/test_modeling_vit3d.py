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


def test_hidden_states_are_the_patches_after_each_layer_and_the_last_is_normalised():
    model = tiny_model(use_final_norm=True, use_patch_norm=False)
    assert type(model.embeddings.voxel_norm) is type(model.embeddings.token_norm) is nn.Identity
    nn.init.normal_(model.norm.weight)
    passed = []
    for module in (model.embeddings, *model.layers):
        module.register_forward_hook(lambda module, inputs, output: passed.append(output))
    outputs = model(tiny.random_volumes(2), output_hidden_states=True)
    expected = [*passed[:-1], model.norm(passed[-1])]
    assert len(outputs.hidden_states) == len(expected) == 4
    for ours, theirs in zip(outputs.hidden_states, expected):
        assert torch.equal(ours, theirs[:, 1:])  # without the class token
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    assert torch.equal(outputs.pooler_output, outputs.hidden_states[-1].mean(dim=1))


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


def test_attention_weights_of_every_layer_are_returned_when_asked_for():
    model = tiny_model(attn_implementation="eager")
    passed = []
    for layer in model.layers:
        layer.attention_norm.register_forward_hook(lambda module, inputs, output: passed.append(output))
    attentions = model(tiny.random_volumes(2), output_attentions=True).attentions
    assert len(attentions) == len(passed) == 3
    for layer, hidden_states, weights in zip(model.layers, passed, attentions):
        query, key = (
            projection(hidden_states).view(2, 13, 2, 5).transpose(1, 2)
            for projection in (layer.attention.q_proj, layer.attention.k_proj)
        )
        torch.testing.assert_close(weights, torch.softmax(query @ key.transpose(2, 3) / 5**0.5, dim=-1))
    assert model(tiny.random_volumes(1)).attentions is None


def test_attention_weights_of_another_implementation_are_refused():
    with pytest.raises(ValueError, match="weights.*'sdpa'.*`attn_implementation=\"eager\"`"):
        tiny_model(attn_implementation="sdpa")(tiny.random_volumes(1), output_attentions=True)


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
