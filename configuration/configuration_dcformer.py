"""Configuration of the DCFormer encoder."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict

from .transformers_version import BackboneConfigMixin, PreTrainedConfig


# The six published sizes (Ates et al. 2025, and the implementation released with Med3DVLM): blocks and channels of the
# stem and the four stages. They have 0.8, 5.9, 14.7, 18.2, 33.9 and 185.1 million parameters; Med3DVLM uses "small".
DCFORMER_VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "nano": {"depths": (1, 1, 1, 1, 1), "hidden_sizes": (32, 32, 64, 128, 256)},
    "naive": {"depths": (1, 2, 2, 2, 2), "hidden_sizes": (32, 64, 128, 256, 512)},
    "tiny": {"depths": (1, 2, 3, 3, 2), "hidden_sizes": (64, 96, 192, 384, 768)},
    "small": {"depths": (1, 2, 3, 6, 2), "hidden_sizes": (64, 96, 192, 384, 768)},
    "base": {"depths": (1, 2, 6, 6, 2), "hidden_sizes": (64, 128, 256, 512, 1024)},
    "large": {"depths": (1, 2, 6, 12, 2), "hidden_sizes": (64, 256, 512, 1024, 2048)},
}


@strict
class DCFormerConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`DCFormerModel`], the decomposed-convolution encoder of one 3D volume. The defaults give
    DCFormer-small, the encoder of Med3DVLM; [`~DCFormerConfig.from_variant`] gives the other published sizes.

    Args:
        image_size (`tuple[int, int, int]`, *optional*, defaults to `(128, 256, 256)`):
            Voxels along `(depth, height, width)` of the volumes the model is meant for. The encoder itself runs on any
            size; token counts, and with them every projector, follow from this one.
        num_channels (`int`, *optional*, defaults to 1):
            Channels of a volume.
        hidden_sizes (`tuple[int, ...]`, *optional*, defaults to `(64, 96, 192, 384, 768)`):
            Channels after the stem and after each stage.
        depths (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 3, 6, 2)`):
            Blocks in the stem and in each stage. The stem is one block of four decomposed convolutions.
        kernel_sizes (`tuple[int, ...]`, *optional*, defaults to `(7, 13, 11, 9, 7)`):
            Voxels a one-dimensional convolution spans, in the stem's first layer and in each stage. Odd numbers.
        mlp_ratio (`int`, *optional*, defaults to 4):
            Width of a block's MLP over its number of channels.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP. `"gelu"` is the exact (erf) form; the tanh form moves outputs by 3e-5.
        layer_scale_init_value (`float`, *optional*, defaults to 1e-6):
            Initial value of the per-channel factor on each block's residual branch.
        batch_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the batch normalisations.
        batch_norm_momentum (`float`, *optional*, defaults to 0.1):
            Share of the new batch in the running statistics.
        sync_batch_norm (`bool`, *optional*, defaults to `False`):
            Whether batch statistics in training are those of the batches of all processes, which then must all take part
            in every step; the original's are per process. Without effect at inference and in one process.
        out_features (`list[str]`, *optional*), out_indices (`list[int]`, *optional*):
            Stages that [`DCFormerBackbone`] returns, by name (`"stem"`, `"stage1"`, ...) or by number.

    Example:

    ```python
    >>> from med3dvlm import DCFormerConfig, DCFormerModel

    >>> config = DCFormerConfig()
    >>> config.num_tokens(-2), config.num_tokens(-1)  # low-level stream, high-level stream
    (256, 32)
    >>> model = DCFormerModel(DCFormerConfig.from_variant("nano"))
    >>> model.num_parameters()
    789216
    ```"""

    model_type = "dcformer"
    base_config_key = "vision_config"

    image_size: list[int] | tuple[int, ...] = (128, 256, 256)
    num_channels: int = 1
    hidden_sizes: list[int] | tuple[int, ...] = (64, 96, 192, 384, 768)
    depths: list[int] | tuple[int, ...] = (1, 2, 3, 6, 2)
    kernel_sizes: list[int] | tuple[int, ...] = (7, 13, 11, 9, 7)
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_scale_init_value: float = 1e-6
    batch_norm_eps: float = 1e-5
    batch_norm_momentum: float = 0.1
    sync_batch_norm: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        self.auto_map = {
            "AutoConfig": "configuration_dcformer.DCFormerConfig",
            "AutoModel": "modeling_dcformer.DCFormerModel",
            "AutoBackbone": "modeling_dcformer.DCFormerBackbone",
        }
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, len(self.depths))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_variant(cls, variant: str, **kwargs: Any) -> "DCFormerConfig":
        """
        Configuration of one of the published sizes.

        Args:
            variant (`str`):
                `"nano"`, `"naive"`, `"tiny"`, `"small"`, `"base"` or `"large"`.
            kwargs:
                Fields that replace the variant's, such as `image_size`.

        Raises:
            ValueError: `variant` is not one of them.
        """
        if variant not in DCFORMER_VARIANTS:
            raise ValueError(f"Expected one of the DCFormer variants {sorted(DCFORMER_VARIANTS)}, got {variant!r}.")
        return cls(**{**DCFORMER_VARIANTS[variant], **kwargs})

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    def grid(self, stage: int) -> tuple[int, int, int]:
        """Voxels of stage `stage` along `(depth, height, width)`; the stem divides each axis by 4, a stage by 2."""
        stride = 4 * 2 ** range(len(self.depths))[stage]
        depth, height, width = (math.ceil(size / stride) for size in self.image_size)
        return depth, height, width

    def num_tokens(self, stage: int) -> int:
        """Number of positions of stage `stage` (0 is the stem, -1 the last), in raster order with depth slowest."""
        return math.prod(self.grid(stage))

    def token_size(self, stage: int) -> int:
        """Channels of stage `stage` (0 is the stem, -1 the last)."""
        return self.hidden_sizes[stage]

    def validate_architecture(self):
        """Part of the `@strict` validation: refuses what cannot be built, and says what to change."""
        if not len(self.hidden_sizes) == len(self.depths) == len(self.kernel_sizes) >= 2:
            raise ValueError(
                "`hidden_sizes`, `depths` and `kernel_sizes` each need one entry for the stem and one per stage, got "
                f"{len(self.hidden_sizes)}, {len(self.depths)} and {len(self.kernel_sizes)} entries: make them equally "
                "long, at least 2."
            )
        if len(self.image_size) != 3 or min(self.image_size) < 1:
            raise ValueError(
                f"`image_size` must be three positive numbers of voxels (depth, height, width), got {self.image_size}."
            )
        if self.depths[0] != 1:
            raise ValueError(f"`depths[0]` must be 1, the stem is one block, got {self.depths[0]}.")
        if min(*self.depths, *self.hidden_sizes, self.num_channels, self.mlp_ratio) < 1:
            raise ValueError(
                "`depths`, `hidden_sizes`, `num_channels` and `mlp_ratio` must be positive, got "
                f"{self.depths}, {self.hidden_sizes}, {self.num_channels} and {self.mlp_ratio}."
            )
        if any(size < 1 or size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(
                f"`kernel_sizes` must be odd, so that padding keeps the grid centred, got {self.kernel_sizes}."
            )


__all__ = ["DCFORMER_VARIANTS", "DCFormerConfig"]
