"""The releases of transformers that this code is made for, and what it needs of them."""

import re

import transformers
from transformers.utils import logging


logger = logging.get_logger(__name__)

REQUIREMENT = "transformers>=5.23,<5.25"
FIRST_UNTRIED = (5, 25)

try:
    from transformers.backbone_utils import BackboneConfigMixin
    from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
except ImportError as error:
    raise ImportError(
        f'Med3DVLM needs transformers 5.23 or later, found {transformers.__version__}: pip install -U "{REQUIREMENT}"'
    ) from error

if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) >= FIRST_UNTRIED:
    logger.warning_once(
        f'Med3DVLM is untried with transformers {transformers.__version__}. Where it fails, pip install "{REQUIREMENT}".'
    )


__all__ = ["FIRST_UNTRIED", "REQUIREMENT", "BackboneConfigMixin", "PreTrainedConfig", "SubConfigSpec"]
