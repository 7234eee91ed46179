import pytest
import tiny
import torch

from med3dvlm.modeling_med3dvlm.modeling_projector import PROJECTORS, Med3DVLMMixerLayer


@pytest.mark.parametrize(
    "projector_type, overrides",
    [
        ("mixer", {}),
        ("mixer", {"low_level_tokens": (5,), "high_level_tokens": (4,)}),
        ("mixer", {"low_level_tokens": (9, 7, 5), "high_level_tokens": (4,)}),
        ("mixer", {"projector_depth": 1}),
        ("low_high_mlp", {}),
        ("low_high_mlp", {"projector_depth": 1}),
        ("mlp", {"projector_depth": 3}),
        ("linear", {}),
        ("mhsa", {"vision_config": tiny.tiny_dcformer_config(hidden_sizes=(4, 6, 8, 10, 16))}),
        ("mixer", {"vision_config": tiny.tiny_vit3d_config()}),
        ("mlp", {"vision_config": tiny.tiny_vit3d_config()}),
    ],
)
def test_projector_gives_the_promised_tokens_and_trains_every_weight(projector_type, overrides):
    config = tiny.tiny_vlm_config(projector_type=projector_type, **overrides)
    projector = PROJECTORS[projector_type](config)
    vision = config.vision_config
    low, high = (torch.randn(2, vision.num_tokens(stage), vision.token_size(stage)) for stage in (-2, -1))
    tokens = projector(low, high)
    assert tokens.shape == (2, config.image_seq_length, 32)
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in projector.parameters())


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_projector_takes_an_encoder_of_another_precision(projector_type):
    vision_config = tiny.tiny_dcformer_config(hidden_sizes=(4, 6, 8, 10, 16))
    config = tiny.tiny_vlm_config(projector_type=projector_type, vision_config=vision_config)
    projector = PROJECTORS[projector_type](config)
    vision = config.vision_config
    low, high = (torch.randn(1, vision.num_tokens(stage), vision.token_size(stage)).bfloat16() for stage in (-2, -1))
    assert torch.equal(projector(low, high), projector(low.float(), high.float()))


def test_channels_double_from_mixer_layer_to_mixer_layer_up_to_the_text_width():
    config = tiny.tiny_vlm_config(low_level_tokens=(9, 7, 5, 3), high_level_tokens=(8, 6, 4))
    projector = PROJECTORS["mixer"](config)
    low, high = projector.low_mixer, projector.high_mixer
    assert [layer.channel_mlp[-1].out_features for layer in low] == [4, 8, 16, 32]
    assert [layer.channel_mlp[-1].out_features for layer in high] == [8, 16, 32]
    assert [layer.token_mlp[-1].out_features for layer in [*low, *high]] == [9, 7, 5, 3, 8, 6, 4]
    assert [layer.channel_mlp[0].in_features for layer in high] == [12, 8, 16]


def test_mixer_layer_is_two_mlps_without_residuals():
    config = tiny.tiny_vlm_config()
    layer = Med3DVLMMixerLayer(config, in_tokens=6, out_tokens=5, in_channels=8, out_channels=10)
    states = torch.randn(2, 6, 8)
    mixed = layer.token_mlp(layer.token_norm(states).transpose(1, 2)).transpose(1, 2)
    expected = layer.channel_mlp(layer.channel_norm(mixed))
    assert torch.equal(layer(states), expected) and expected.shape == (2, 5, 10)


def test_low_tokens_come_before_high_tokens():
    projector = PROJECTORS["mixer"](tiny.tiny_vlm_config())
    low, high = torch.randn(1, 6, 10), torch.randn(1, 2, 12)
    changed = projector(low, torch.randn(1, 2, 12)) != projector(low, high)
    assert not changed[:, :5].any() and changed[:, 5:].any()
