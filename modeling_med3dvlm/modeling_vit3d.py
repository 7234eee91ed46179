"""Vit3D: a plain vision transformer over the patches of a 3D volume, the baseline encoder of Med3DVLM's Table 5."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.configuration_vit3d import Vit3DConfig
from .strict_loading import StrictLoadingMixin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in plain operations; queries, keys and values are `(batch_size, heads, tokens, head_dim)`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights  # (B, heads, N, d) -> (B, N, heads, d)


class Vit3DEmbeddings(nn.Module):
    """Patches as tokens: normalised voxels, a linear map, a normalisation; then the class token and the positions."""

    def __init__(self, config: Vit3DConfig):
        super().__init__()
        self.num_channels, self.image_size = config.num_channels, tuple(config.image_size)
        self.grid, self.patch_size = config.grid(), tuple(config.patch_size)
        depth, height, width = config.patch_size
        num_voxels = config.num_channels * depth * height * width
        use_norm = config.use_patch_norm
        self.voxel_norm = nn.LayerNorm(num_voxels, eps=config.layer_norm_eps) if use_norm else nn.Identity()
        self.projection = nn.Linear(num_voxels, config.hidden_size)
        self.token_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if use_norm else nn.Identity()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_tokens() + 1, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, num_channels, D, H, W) -> (B, 1 + tokens, hidden_size), the class token first."""
        if tuple(pixel_values.shape[1:]) != (self.num_channels, *self.image_size):
            raise ValueError(
                f"Expected `pixel_values` of shape (batch_size, {self.num_channels}, depth, height, width) with "
                f"`image_size` {self.image_size}, got {tuple(pixel_values.shape)}. Prepare volumes with the model's "
                "Med3DVLMImageProcessor; the position embeddings fit one size only."
            )
        pixel_values = pixel_values.to(self.cls_token.dtype)  # a quantised weight has the type of its storage
        (d, h, w), (pd, ph, pw) = self.grid, self.patch_size
        patches = pixel_values.reshape(-1, self.num_channels, d, pd, h, ph, w, pw)
        patches = patches.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, C, d, pd, h, ph, w, pw) -> (B, d, h, w, pd, ph, pw, C)
        patches = patches.flatten(4).flatten(1, 3)  # (B, d, h, w, pd, ph, pw, C) -> (B, d * h * w, pd * ph * pw * C)
        tokens = self.token_norm(self.projection(self.voxel_norm(patches)))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + self.position_embeddings


class Vit3DAttention(nn.Module):
    """Multi-head self-attention; queries, keys and values without a bias."""

    def __init__(self, config: Vit3DConfig):
        super().__init__()
        self.config = config
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, False
        inner_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.out_proj = nn.Linear(inner_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        all_attentions: list[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, N, hidden_size) -> (B, N, hidden_size); the weights, (B, heads, N, N), are added to `all_attentions`."""
        batch_size, num_tokens, _ = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(batch_size, num_tokens, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, N, heads * d) -> (B, heads, N, d)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        if all_attentions is not None:
            all_attentions.append(weights)
        return self.out_proj(attended.reshape(batch_size, num_tokens, -1))  # (B, N, heads, d) -> (B, N, hidden_size)


class Vit3DLayer(GradientCheckpointingLayer):
    """Pre-norm attention and pre-norm MLP, each added to its input."""

    def __init__(self, config: Vit3DConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Vit3DAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, N, hidden_size) -> (B, N, hidden_size); `kwargs` go to the attention."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), **kwargs)
        return hidden_states + self.fc2(self.act(self.fc1(self.mlp_norm(hidden_states))))


class Vit3DPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Initialisation and capabilities of the 3D vision transformer."""

    config: Vit3DConfig
    base_model_prefix = "vit3d"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Vit3DEmbeddings", "Vit3DLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Normal weights of `initializer_range`; the raw parameters of the embeddings are set here too."""
        super()._init_weights(module)
        if isinstance(module, Vit3DEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)


class Vit3DModel(Vit3DPreTrainedModel):
    """
    The 3D vision transformer. Patches are tokens in raster order with depth slowest; the class token takes part in the
    attention and is dropped at the end. There is no final normalisation, unless `use_final_norm` asks for one.

    Example:

    ```python
    >>> import torch
    >>> from med3dvlm import Vit3DConfig, Vit3DModel

    >>> config = Vit3DConfig(image_size=(16, 32, 48), patch_size=(8, 16, 16), hidden_size=32, num_hidden_layers=2)
    >>> Vit3DModel(config).eval()(torch.rand(1, 1, 16, 32, 48)).last_hidden_state.shape
    torch.Size([1, 12, 32])
    ```"""

    def __init__(self, config: Vit3DConfig):
        super().__init__(config)
        self.embeddings = Vit3DEmbeddings(config)
        self.layers = nn.ModuleList([Vit3DLayer(config) for _ in range(config.num_hidden_layers)])
        use_norm = config.use_final_norm
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if use_norm else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, depth, height, width)`):
                Volumes of `config.image_size`, scaled to [0, 1].
            output_hidden_states (`bool`, *optional*):
                Whether to return the tokens before the first and after every layer.
            output_attentions (`bool`, *optional*):
                Whether to return the attention weights of every layer, which only `attn_implementation="eager"` has.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]:

            - **last_hidden_state** (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): the patches.
            - **pooler_output** (`torch.Tensor` of shape `(batch_size, hidden_size)`): their mean.
            - **hidden_states** (`tuple` of `torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): the
              patches at every depth, the last normalised where there is a final normalisation; only with
              `output_hidden_states`.
            - **attentions** (`tuple` of `torch.Tensor` of shape `(batch_size, heads, 1 + num_tokens, 1 + num_tokens)`): the
              weights of every layer, the class token first; only with `output_attentions`.

        Raises:
            ValueError: `pixel_values` has another size or another number of channels, or `output_attentions` is asked of an
                implementation that computes no weights.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_attentions` asks for weights that the attention {self.config._attn_implementation!r} does not "
                'compute: load the model with `attn_implementation="eager"`.'
            )
        all_attentions: list[torch.Tensor] | None = [] if output_attentions else None

        hidden_states = self.embeddings(pixel_values)
        all_hidden_states = [hidden_states[:, 1:]]
        for layer in self.layers:
            hidden_states = layer(hidden_states, all_attentions=all_attentions, **kwargs)
            all_hidden_states.append(hidden_states[:, 1:])  # without the class token
        patches = self.norm(hidden_states)[:, 1:]
        all_hidden_states[-1] = patches

        return BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=patches.mean(dim=1),  # (B, N, C) -> (B, C)
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=None if all_attentions is None else tuple(all_attentions),
        )


__all__ = ["Vit3DModel", "Vit3DPreTrainedModel"]
