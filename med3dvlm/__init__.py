"""Med3DVLM: vision-language models for 3D medical images, native to Hugging Face transformers.

Importing the package is quick and registers its classes with the Auto classes of transformers; each class is loaded
when it is first used.
"""

import importlib
from typing import Any

from .hub_cards.registration import install as _install_registration


__version__ = "0.1.0"

_MODULE_OF: dict[str, str] = {
    "CT_WINDOWS": "processing.image_processing_med3dvlm",
    "DCFormerBackbone": "modeling_med3dvlm.modeling_dcformer",
    "DCFormerConfig": "configuration.configuration_dcformer",
    "DCFormerModel": "modeling_med3dvlm.modeling_dcformer",
    "DCFormerSiglipConfig": "configuration.configuration_dcformer_siglip",
    "DCFormerSiglipModel": "modeling_med3dvlm.modeling_dcformer_siglip",
    "Med3DVLMConfig": "configuration.configuration_med3dvlm",
    "Med3DVLMForConditionalGeneration": "modeling_med3dvlm.modeling_med3dvlm",
    "Med3DVLMImageProcessor": "processing.image_processing_med3dvlm",
    "Med3DVLMModel": "modeling_med3dvlm.modeling_med3dvlm",
    "Med3DVLMPipeline": "processing.pipeline_med3dvlm",
    "Med3DVLMProcessor": "processing.processing_med3dvlm",
    "Vit3DConfig": "configuration.configuration_vit3d",
    "Vit3DModel": "modeling_med3dvlm.modeling_vit3d",
    "contrastive_loss": "modeling_med3dvlm.contrastive_loss",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_install_registration()
