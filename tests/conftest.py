"""Shared test set-up: offline, without torchvision, tiny models with unequal axes."""

import os
import sys


# Before transformers is imported: nothing here may reach a network, and no test may depend on torchvision.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules["torchvision"] = None  # type: ignore[assignment]
