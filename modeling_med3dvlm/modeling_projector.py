"""The projectors that turn encoder stages into tokens of the language model (Xin et al. 2025)."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration.configuration_med3dvlm import Med3DVLMConfig


def in_precision_of(projector: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """
    Tokens of the encoder in the precision of a projector, which is another where the projector alone is trained in float32.
    Quantised weights, of one byte or less, say nothing about it.
    """
    for parameter in projector.parameters():
        if parameter.is_floating_point() and parameter.itemsize > 1:
            return states.to(parameter.dtype)
    return states


class Med3DVLMMLP(nn.Sequential):
    """`depth` linear layers with an activation between two of them: (..., in_size) -> (..., out_size)."""

    def __init__(self, config: Med3DVLMConfig, in_size: int, out_size: int):
        layers: list[nn.Module] = [nn.Linear(in_size, out_size)]
        for _ in range(config.projector_depth - 1):
            layers += [ACT2FN[config.projector_hidden_act], nn.Linear(out_size, out_size)]
        super().__init__(*layers)


class Med3DVLMMixerLayer(nn.Module):
    """An MLP-Mixer layer that also resizes its input: the token axis first, then the channel axis."""

    def __init__(self, config: Med3DVLMConfig, in_tokens: int, out_tokens: int, in_channels: int, out_channels: int):
        super().__init__()
        self.token_norm = nn.LayerNorm(in_channels)
        self.token_mlp = Med3DVLMMLP(config, in_tokens, out_tokens)
        self.channel_norm = nn.LayerNorm(in_channels)
        self.channel_mlp = Med3DVLMMLP(config, in_channels, out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_tokens, in_channels)`):
                One encoder stage, tokens in raster order with depth slowest.

        Returns:
            `torch.Tensor` of shape `(batch_size, out_tokens, out_channels)`.
        """
        hidden_states = self.token_norm(hidden_states).transpose(1, 2)  # (B, N, C) -> (B, C, N)
        hidden_states = self.token_mlp(hidden_states).transpose(1, 2)  # (B, C, N) -> (B, N', C)
        # No residual around either MLP: both axes change size, and published weights were trained without one.
        return self.channel_mlp(self.channel_norm(hidden_states))  # (B, N', C) -> (B, N', C')


class Med3DVLMMixerProjector(nn.Module):
    """The low-high hybrid: a stack of Mixer layers for each stream, whose tokens stand side by side, low first."""

    def __init__(self, config: Med3DVLMConfig):
        super().__init__()
        low_layer, high_layer = config.vision_feature_layers
        self.low_mixer = self.build_stack(config, low_layer, config.low_level_tokens)
        self.high_mixer = self.build_stack(config, high_layer, config.high_level_tokens)

    @staticmethod
    def build_stack(config: Med3DVLMConfig, stage: int, out_tokens: list[int] | tuple[int, ...]) -> nn.Sequential:
        """Mixer layers from an encoder stage to the text width, the channels doubling up to it."""
        text_hidden_size = config.text_config.get_text_config(decoder=True).hidden_size
        num_tokens, num_channels = config.vision_config.num_tokens(stage), config.vision_config.token_size(stage)
        layers = []
        for remaining, tokens in zip(reversed(range(len(out_tokens))), out_tokens):
            channels = text_hidden_size // 2**remaining
            layers.append(Med3DVLMMixerLayer(config, num_tokens, tokens, num_channels, channels))
            num_tokens, num_channels = tokens, channels
        return nn.Sequential(*layers)

    def forward(self, low_level_states: torch.Tensor, high_level_states: torch.Tensor) -> torch.Tensor:
        """(B, N_low, C_low), (B, N_high, C_high) -> (B, image_seq_length, text_hidden_size)."""
        low = self.low_mixer(in_precision_of(self, low_level_states))
        high = self.high_mixer(in_precision_of(self, high_level_states))
        return torch.cat([low, high], dim=1)


class Med3DVLMLowHighMLPProjector(nn.Module):
    """Both streams brought to the text width, side by side, low first, and one MLP over all their tokens."""

    def __init__(self, config: Med3DVLMConfig):
        super().__init__()
        low_layer, high_layer = config.vision_feature_layers
        text_hidden_size = config.text_config.get_text_config(decoder=True).hidden_size
        self.low_projection = nn.Linear(config.vision_config.token_size(low_layer), text_hidden_size)
        self.high_projection = nn.Linear(config.vision_config.token_size(high_layer), text_hidden_size)
        layers: list[nn.Module] = []
        for _ in range(config.projector_depth - 1):
            layers += [ACT2FN[config.projector_hidden_act], nn.Linear(text_hidden_size, text_hidden_size)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, low_level_states: torch.Tensor, high_level_states: torch.Tensor) -> torch.Tensor:
        """(B, N_low, C_low), (B, N_high, C_high) -> (B, N_low + N_high, text_hidden_size)."""
        low = self.low_projection(in_precision_of(self, low_level_states))
        high = self.high_projection(in_precision_of(self, high_level_states))
        return self.mlp(torch.cat([low, high], dim=1))


class Med3DVLMMLPProjector(nn.Module):
    """An MLP over the tokens of the last stage; with a depth of 1 a linear map."""

    def __init__(self, config: Med3DVLMConfig):
        super().__init__()
        in_size = config.vision_config.token_size(config.vision_feature_layers[1])
        self.mlp = Med3DVLMMLP(config, in_size, config.text_config.get_text_config(decoder=True).hidden_size)

    def forward(self, low_level_states: torch.Tensor, high_level_states: torch.Tensor) -> torch.Tensor:
        """(B, N_high, C_high) -> (B, N_high, text_hidden_size); the low-level stream is not used."""
        return self.mlp(in_precision_of(self, high_level_states))


class Med3DVLMLinearProjector(nn.Module):
    """One linear map of the tokens of the last stage."""

    def __init__(self, config: Med3DVLMConfig):
        super().__init__()
        in_size = config.vision_config.token_size(config.vision_feature_layers[1])
        self.projection = nn.Linear(in_size, config.text_config.get_text_config(decoder=True).hidden_size)

    def forward(self, low_level_states: torch.Tensor, high_level_states: torch.Tensor) -> torch.Tensor:
        """(B, N_high, C_high) -> (B, N_high, text_hidden_size); the low-level stream is not used."""
        return self.projection(in_precision_of(self, high_level_states))


class Med3DVLMSelfAttentionProjector(nn.Module):
    """Self-attention and an MLP over the tokens of the last stage, without residuals, then a linear map."""

    num_heads = 8

    def __init__(self, config: Med3DVLMConfig):
        super().__init__()
        size = config.vision_config.token_size(config.vision_feature_layers[1])
        self.attention_norm = nn.LayerNorm(size)
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, 4 * size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.fc2 = nn.Linear(4 * size, size)
        self.projection = nn.Linear(size, config.text_config.get_text_config(decoder=True).hidden_size)

    def forward(self, low_level_states: torch.Tensor, high_level_states: torch.Tensor) -> torch.Tensor:
        """(B, N_high, C_high) -> (B, N_high, text_hidden_size); the low-level stream is not used."""
        hidden_states = self.attention_norm(in_precision_of(self, high_level_states))
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, N, C) -> (B, heads, N, C / heads)
        hidden_states = nn.functional.scaled_dot_product_attention(query, key, value)
        hidden_states = self.out_proj(hidden_states.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, C)
        hidden_states = self.fc2(self.act(self.fc1(self.mlp_norm(hidden_states))))
        return self.projection(self.act(hidden_states))


PROJECTORS: dict[str, type[nn.Module]] = {
    "mixer": Med3DVLMMixerProjector,
    "low_high_mlp": Med3DVLMLowHighMLPProjector,
    "mlp": Med3DVLMMLPProjector,
    "linear": Med3DVLMLinearProjector,
    "mhsa": Med3DVLMSelfAttentionProjector,
}


__all__ = ["PROJECTORS"]
