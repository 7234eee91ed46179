"""Configuration of the 3D vision transformer, the baseline encoder."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict

from .transformers_version import PreTrainedConfig


@strict
class Vit3DConfig(PreTrainedConfig):
    r"""
    Configuration of [`Vit3DModel`], the plain 3D vision transformer that Med3DVLM's Table 5 compares DCFormer with.

    Args:
        image_size (`tuple[int, int, int]`, *optional*, defaults to `(128, 256, 256)`):
            Voxels along `(depth, height, width)`, each a multiple of the patch.
        patch_size (`tuple[int, int, int]`, *optional*, defaults to `(32, 32, 32)`):
            Voxels of one patch along `(depth, height, width)`.
        num_channels (`int`, *optional*, defaults to 1):
            Channels of a volume.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of a token.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Transformer layers.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads.
        head_dim (`int`, *optional*, defaults to 64):
            Width of one head; heads times width need not equal `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the MLP. The published baseline was built with 4 where 4 times `hidden_size` was meant: pass 4 to
            rebuild it.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP, the exact (erf) form.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer normalisations.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        use_patch_norm (`bool`, *optional*, defaults to `True`):
            Whether voxels and tokens of a patch are normalised. M3D-CLIP's transformer does neither.
        use_final_norm (`bool`, *optional*, defaults to `False`):
            Whether the last layer is followed by a normalisation, as in M3D-CLIP's.

    Example:

    ```python
    >>> from med3dvlm import Vit3DConfig

    >>> Vit3DConfig().num_tokens(-1)
    256
    ```"""

    model_type = "vit3d"
    base_config_key = "vision_config"

    image_size: list[int] | tuple[int, ...] = (128, 256, 256)
    patch_size: list[int] | tuple[int, ...] = (32, 32, 32)
    num_channels: int = 1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_patch_norm: bool = True
    use_final_norm: bool = False

    def __post_init__(self, **kwargs: Any):
        self.auto_map = {"AutoConfig": "configuration_vit3d.Vit3DConfig", "AutoModel": "modeling_vit3d.Vit3DModel"}
        super().__post_init__(**kwargs)

    def grid(self, stage: int = -1) -> tuple[int, int, int]:
        """Patches along `(depth, height, width)`, the same for every layer."""
        depth, height, width = (size // patch for size, patch in zip(self.image_size, self.patch_size))
        return depth, height, width

    def num_tokens(self, stage: int = -1) -> int:
        """Number of patches, in raster order with depth slowest; every layer has the same."""
        return math.prod(self.grid(stage))

    def token_size(self, stage: int = -1) -> int:
        """Width of a token, the same for every layer."""
        return self.hidden_size

    def validate_architecture(self):
        """Part of the `@strict` validation: refuses what cannot be built, and says what to change."""
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < 1:
                raise ValueError(f"`{name}` must be three positive numbers (depth, height, width), got {value}.")
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size)):
            raise ValueError(
                f"`image_size` {tuple(self.image_size)} (depth, height, width) must be a multiple of `patch_size` "
                f"{tuple(self.patch_size)} on every axis: change either."
            )
        for name in ("num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


__all__ = ["Vit3DConfig"]
