"""Published tiny models of every kind, made once."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, IMAGE_TOKEN_ID, VOCAB_SIZE, tiny_dcformer_config, tiny_siglip, tiny_vit3d_config, tiny_vlm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from med3dvlm import DCFormerModel, Med3DVLMImageProcessor, Med3DVLMProcessor, Vit3DModel
from med3dvlm.hub_cards.publish import publish


ROOT = Path(__file__).parents[2]
HIDDEN = ["med3dvlm", "peft", "datasets", "accelerate", "deepspeed", "torchvision", "timm"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>", "<cls>", "<sep>", "<|im_start|>", "<|im_end|>", "<image>"]
    words = ["Is", "there", "a", "pleural", "effusion", "?", "No", ".", "user", "assistant", "system"]
    vocabulary = special + words + [f"w{number}" for number in range(VOCAB_SIZE - len(special) - len(words))]
    assert vocabulary.index("<image>") == IMAGE_TOKEN_ID
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        padding_side="left",
    )


def build_processor(image_seq_length: int | None) -> Med3DVLMProcessor:
    return Med3DVLMProcessor(
        Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE)), build_tokenizer(), image_seq_length=image_seq_length
    )


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def vlm():
    model = tiny_vlm()
    return SimpleNamespace(model=model, processor=build_processor(model.config.image_seq_length))


@pytest.fixture(scope="session")
def siglip():
    return SimpleNamespace(model=tiny_siglip(), processor=build_processor(None))


@pytest.fixture(scope="session")
def encoder():
    torch.manual_seed(0)
    processor = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))
    return SimpleNamespace(model=DCFormerModel(tiny_dcformer_config()).eval(), processor=processor)


@pytest.fixture(scope="session")
def vit3d():
    torch.manual_seed(0)
    processor = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE), intensity_mode="percentile", orientation="none")
    return SimpleNamespace(model=Vit3DModel(tiny_vit3d_config()).eval(), processor=processor)


@pytest.fixture(scope="session")
def published(tmp_path_factory, vlm, siglip, encoder, vit3d):
    """Folder by kind of model."""
    root = tmp_path_factory.mktemp("published")
    kinds = {"vlm": vlm, "siglip": siglip, "encoder": encoder, "vit3d": vit3d}
    return {
        name: Path(publish(kind.model, root / name, processor=kind.processor, notes="Random weights."))
        for name, kind in kinds.items()
    }


@pytest.fixture(scope="session")
def scan(tmp_path_factory):
    """A small CT with air, three different axes and an oblique affine."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 1200, size=(18, 22, 14), dtype=np.int16)
    affine = np.array([[-2.0, 0.1, 0, 10], [0.1, -1.5, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture(scope="session")
def run_python():
    """Runs Python in a process of its own, outside of the checkout, and returns what it printed."""

    def run(*arguments: object, check: bool = True) -> str:
        result = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd="/",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        assert not check or result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    return run


@pytest.fixture(scope="session")
def run_clean(run_python):
    """Runs `clean_environment.py` where neither our package nor any optional one can be imported."""

    def run(*arguments: object) -> str:
        return run_python(Path(__file__).with_name("clean_environment.py"), *arguments, "--hide", *HIDDEN)

    return run


@pytest.fixture(scope="session")
def run_installed(run_python):
    """Runs `clean_environment.py` with the installed package."""

    def run(*arguments: object) -> str:
        hidden = [name for name in HIDDEN if name != "med3dvlm"]
        return run_python(
            Path(__file__).with_name("clean_environment.py"), *arguments, "--installed", "--hide", *hidden
        )

    return run
