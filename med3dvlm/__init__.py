"""Med3DVLM: vision-language models for 3D medical images, native to Hugging Face transformers.

Importing the package is quick and registers its classes with the Auto classes of transformers; each class is loaded
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .hub_cards.registration import install as _install_registration


__version__ = "0.1.0"

_MODULE_OF: dict[str, str] = {
    "CT_WINDOWS": "processing.image_processing_med3dvlm",
    "DCFormerBackbone": "modeling_med3dvlm.modeling_dcformer",
    "DCFormerConfig": "configuration.configuration_dcformer",
    "DCFormerModel": "modeling_med3dvlm.modeling_dcformer",
    "DCFormerSiglipConfig": "configuration.configuration_dcformer_siglip",
    "DCFormerSiglipModel": "modeling_med3dvlm.modeling_dcformer_siglip",
    "InvalidVolumeError": "processing.volume_io",
    "Med3DVLMConfig": "configuration.configuration_med3dvlm",
    "Med3DVLMForConditionalGeneration": "modeling_med3dvlm.modeling_med3dvlm",
    "Med3DVLMImageProcessor": "processing.image_processing_med3dvlm",
    "Med3DVLMModel": "modeling_med3dvlm.modeling_med3dvlm",
    "Med3DVLMPipeline": "processing.pipeline_med3dvlm",
    "Med3DVLMProcessor": "processing.processing_med3dvlm",
    "Vit3DConfig": "configuration.configuration_vit3d",
    "Vit3DModel": "modeling_med3dvlm.modeling_vit3d",
    "contrastive_loss": "modeling_med3dvlm.contrastive_loss",
    "publish": "hub_cards.publish",
}

if TYPE_CHECKING:  # what `_MODULE_OF` says, for type checkers and editors
    from .configuration.configuration_dcformer import DCFormerConfig as DCFormerConfig
    from .configuration.configuration_dcformer_siglip import DCFormerSiglipConfig as DCFormerSiglipConfig
    from .configuration.configuration_med3dvlm import Med3DVLMConfig as Med3DVLMConfig
    from .configuration.configuration_vit3d import Vit3DConfig as Vit3DConfig
    from .hub_cards.publish import publish as publish
    from .modeling_med3dvlm.contrastive_loss import contrastive_loss as contrastive_loss
    from .modeling_med3dvlm.modeling_dcformer import DCFormerBackbone as DCFormerBackbone
    from .modeling_med3dvlm.modeling_dcformer import DCFormerModel as DCFormerModel
    from .modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel as DCFormerSiglipModel
    from .modeling_med3dvlm.modeling_med3dvlm import (
        Med3DVLMForConditionalGeneration as Med3DVLMForConditionalGeneration,
    )
    from .modeling_med3dvlm.modeling_med3dvlm import Med3DVLMModel as Med3DVLMModel
    from .modeling_med3dvlm.modeling_vit3d import Vit3DModel as Vit3DModel
    from .processing.image_processing_med3dvlm import CT_WINDOWS as CT_WINDOWS
    from .processing.image_processing_med3dvlm import Med3DVLMImageProcessor as Med3DVLMImageProcessor
    from .processing.pipeline_med3dvlm import Med3DVLMPipeline as Med3DVLMPipeline
    from .processing.processing_med3dvlm import Med3DVLMProcessor as Med3DVLMProcessor
    from .processing.volume_io import InvalidVolumeError as InvalidVolumeError

__all__ = ["__version__", *_MODULE_OF]


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


_install_registration()
