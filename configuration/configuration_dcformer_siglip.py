"""Configuration of the dual encoder that aligns volumes with reports."""

import copy
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from .configuration_dcformer import DCFormerConfig
from .configuration_vit3d import Vit3DConfig
from .transformers_version import PreTrainedConfig, SubConfigSpec


# Encoders of a volume, by `model_type`. A plain table, because a published folder's own classes are not registered
# with `AutoConfig` when the folder is loaded from a disk.
VISION_CONFIGS: dict[str, type[PreTrainedConfig]] = {"dcformer": DCFormerConfig, "vit3d": Vit3DConfig}


def build_vision_config(vision_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """
    The configuration of a volume encoder: as it is, or from a dictionary with its `model_type` ("dcformer" if missing).

    Raises:
        ValueError: the `model_type` is not that of a volume encoder.
    """
    if isinstance(vision_config, PreTrainedConfig):
        model_type = vision_config.model_type
    else:
        fields = dict(vision_config or {})
        model_type = fields.pop("model_type", "dcformer")
    if model_type not in VISION_CONFIGS:
        raise ValueError(
            f"`vision_config.model_type` must be one of {sorted(VISION_CONFIGS)}, the encoders of a volume, got "
            f"{model_type!r}."
        )
    if isinstance(vision_config, PreTrainedConfig):
        return vision_config
    return VISION_CONFIGS[model_type](**fields)


def with_image_size(vision_config: Any, image_size: list[int] | tuple[int, ...]) -> Any:
    """
    A copy of the configuration of a volume encoder for volumes of another size, (depth, height, width) in voxels.

    Raises:
        StrictDataclassClassValidationError: the encoder cannot have that size.
    """
    vision_config = copy.deepcopy(vision_config)  # the caller's own configuration stays as it is
    vision_config.image_size = tuple(image_size)
    vision_config.validate()
    return vision_config


@strict
class DCFormerSiglipConfig(PreTrainedConfig):
    r"""
    Configuration of [`DCFormerSiglipModel`], a volume encoder and a text encoder with a shared embedding space.

    Args:
        vision_config (`DCFormerConfig`, `Vit3DConfig` or `dict`, *optional*):
            The volume encoder; DCFormer-small by default.
        image_size (`tuple[int, int, int]`, *optional*):
            Voxels along `(depth, height, width)`; sets, and afterwards reads, `vision_config.image_size`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Any text encoder that `AutoModel` builds; by default the sizes of ClinicalBERT (a DistilBERT).
        projection_dim (`int`, *optional*, defaults to 768):
            Length of the shared vectors.
        text_pooling (`str`, *optional*, defaults to `"cls"`):
            `"cls"` takes the first token's vector, `"mean"` the average over the tokens that are not padding.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` for the loss of SigLIP (Zhai et al. 2023, Algorithm 1), `"softmax"` for that of CLIP (Radford et
            al. 2021, Figure 3).
        loss_exchange (`str`, *optional*, defaults to `"gather"`):
            How processes of a distributed run see each other's texts: `"gather"` holds all of them at once, `"ring"`
            passes one process's texts on at a time. Losses and gradients are the same.
        loss_chunk_size (`int`, *optional*):
            Texts compared with the process's volumes at a time. A chunk's similarities are computed again in the
            backward pass, which bounds the memory of the loss; not chunked by default.
        logit_scale_init_value (`float`, *optional*):
            Initial logarithm of the temperature. By default log 10 for the sigmoid loss (SigLIP) and log(1 / 0.07) for
            the softmax loss (CLIP).
        logit_bias_init_value (`float`, *optional*, defaults to -10.0):
            Initial offset of the sigmoid loss (SigLIP). The softmax loss has none.

    Example:

    ```python
    >>> from med3dvlm import DCFormerConfig, DCFormerSiglipConfig, DCFormerSiglipModel

    >>> config = DCFormerSiglipConfig(
    ...     vision_config=DCFormerConfig.from_variant("nano", image_size=(32, 64, 64)),
    ...     text_config={"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ...     projection_dim=32,
    ... )
    >>> model = DCFormerSiglipModel(config)
    ```"""

    model_type = "dcformer_siglip"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=DCFormerConfig),
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="distilbert", init_kwargs={"vocab_size": 119547}
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 768
    text_pooling: Literal["cls", "mean"] = "cls"
    loss_type: Literal["sigmoid", "softmax"] = "sigmoid"
    loss_exchange: Literal["gather", "ring"] = "gather"
    loss_chunk_size: int | None = None
    logit_scale_init_value: float | None = None
    logit_bias_init_value: float = -10.0

    def __post_init__(self, **kwargs: Any):
        self.auto_map = {
            "AutoConfig": "configuration_dcformer_siglip.DCFormerSiglipConfig",
            "AutoModel": "modeling_dcformer_siglip.DCFormerSiglipModel",
            "AutoModelForZeroShotImageClassification": "modeling_dcformer_siglip.DCFormerSiglipModel",
        }
        self.vision_config = build_vision_config(self.vision_config)
        if (image_size := kwargs.pop("image_size", None)) is not None:
            self.image_size = image_size
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = math.log(10.0) if self.loss_type == "sigmoid" else math.log(1 / 0.07)
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Voxels along `(depth, height, width)`, those of the volume encoder."""
        return tuple(self.vision_config.image_size)

    @image_size.setter
    def image_size(self, image_size: list[int] | tuple[int, ...]) -> None:
        self.vision_config = with_image_size(self.vision_config, image_size)

    def validate_architecture(self):
        """Part of the `@strict` validation: refuses what cannot be built, and says what to change."""
        if self.projection_dim < 1:
            raise ValueError(f"`projection_dim` must be positive, got {self.projection_dim}.")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(
                f"`loss_chunk_size` must be a positive number of texts, or None for no chunks, got "
                f"{self.loss_chunk_size}."
            )


__all__ = ["VISION_CONFIGS", "DCFormerSiglipConfig", "build_vision_config", "with_image_size"]
