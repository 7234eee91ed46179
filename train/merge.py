"""Adapters: the published folder of one, and its merge into the base model."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from ..hub_cards.model_card import (
    BASE_BEGINS,
    NOT_STATED,
    OF_TRAINING_RECORD,
    check_fields,
    renew_fields,
    stated_fields,
)
from ..hub_cards.model_index import CARD_NAME, read_card
from ..hub_cards.places import is_owned_repository, is_repository
from ..hub_cards.publish import check_destination, publish, read_current_card, replaced_when_complete
from ..hub_cards.training_record import TRAINING_NAME, read_training_record
from ..modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ..processing.processing_med3dvlm import Med3DVLMProcessor
from .files import write_json_atomically


logger = logging.get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"

ADAPTER_CARD = """---
library_name: peft
base_model: {base}
pipeline_tag: image-text-to-text
tags: [vision-language, medical, radiology, 3d, lora]
---

# Adapter of a Med3DVLM

Low-rank adapters of the language model, and the projector in full. The base model is `{base}`.

{notes}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{here}", trust_remote_code=True)  # finds the base model by itself
processor = AutoProcessor.from_pretrained("{here}", trust_remote_code=True)
```

`med3dvlm merge {here} FOLDER` puts it into the base and publishes the whole.

Training data: {training_data}

For research only: not a medical device, not for clinical decisions.

The code in this repository is licensed under Apache-2.0, whatever the licence of the weights.
{training_record}"""
# What `publish_adapter` was told, in the text that it made of `ADAPTER_CARD`.
ADAPTER_TEXT = re.compile(
    r"^Low-rank adapters .*?\n\n(?P<notes>.*?)\n\n```python\n"
    r".*?\n\nTraining data: (?P<training_data>.*?)\n\nFor research only:",
    re.DOTALL | re.MULTILINE,
)


def publish_adapter(
    source: Path,
    destination: Path,
    processor: Med3DVLMProcessor,
    notes: str,
    training_data: str,
    training_record: Mapping[str, Any] | None = None,
) -> None:
    """
    Makes the published folder of an adapter: its weights and configuration, the processor, and a card. It appears whole or
    not at all.

    Args:
        source (`Path`):
            Folder into which Trainer saved the PEFT model.
        destination (`Path`):
            The folder; one that is there is replaced.
        processor ([`Med3DVLMProcessor`]):
            The model's processor.
        notes (`str`), training_data (`str`):
            For the card.
        training_record (`Mapping`, *optional*):
            For `training.json`, see [`~hub_cards.training_record.describe_training`].

    Raises:
        FileNotFoundError: `source` holds no adapter.
    """
    from peft import PeftConfig

    for name in (ADAPTER_CONFIG, "adapter_model.safetensors"):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source}: expected an adapter saved by peft, there is no {name}.")
    base = PeftConfig.from_pretrained(str(source)).base_model_name_or_path
    with replaced_when_complete(destination) as folder:
        for name in (ADAPTER_CONFIG, "adapter_model.safetensors"):
            (folder / name).write_bytes((source / name).read_bytes())
        processor.save_pretrained(folder)
        of_record = "" if training_record is None else f"\n{OF_TRAINING_RECORD}\n"
        card = ADAPTER_CARD.format(
            base=base, here=destination, notes=notes, training_data=training_data, training_record=of_record
        )
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        if training_record is not None:
            write_json_atomically(training_record, folder / TRAINING_NAME)


def merge_adapter(
    adapter: str | os.PathLike, destination: str | os.PathLike, overwrite: bool = False, **card_fields: Any
) -> str:
    """
    Merges an adapter into its base model, and publishes the whole.

    The card takes from those of adapter and base, where these are folders, what is true of the whole, see
    [`describe_merged`]. Scores that stand there are not taken, nor is the record of a conversion: both are of other weights. The
    record of the adapter's training, which has that of the base, goes along.

    Args:
        adapter (`str` or `os.PathLike`):
            Folder or repository of an adapter with its processor.
        destination (`str` or `os.PathLike`):
            The new folder; see [`~hub_cards.publish.publish`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a model that is there.
        card_fields (*optional*):
            For the card, in place of what the other cards say.

    Returns:
        `str`: the new folder.

    Raises:
        FileExistsError: the destination holds files that are not to be replaced.
        FileNotFoundError: there is no adapter, or its base model is not where its configuration says.
        ValueError: the adapter does not fit the base model, is damaged, or holds numbers that are not finite; or the Hub refuses
            what the card is to say.
    """
    from peft import PeftConfig, PeftModel

    check_destination(Path(destination), overwrite)
    adapter = os.fspath(adapter)
    if Path(adapter).is_dir() and not (Path(adapter) / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{adapter}: expected an adapter, there is no {ADAPTER_CONFIG}. A whole model needs no merge."
        )
    settings = PeftConfig.from_pretrained(adapter)
    base = settings.base_model_name_or_path or ""
    missing_base = (
        f"{adapter}: its base model {base!r} is not there. Put it back, or write where it is into `base_model_name_or_path` of "
        f"{ADAPTER_CONFIG}."
    )
    if not Path(base).is_dir() and not is_owned_repository(base):
        raise FileNotFoundError(missing_base)
    fields = renew_fields(describe_merged(adapter, base), stated_fields(card_fields))
    check_fields(fields)
    weights, record = read_adapter_weights(adapter), read_training_record(adapter)
    try:
        model = Med3DVLMForConditionalGeneration.from_pretrained(base, dtype="auto")
    except OSError as error:
        if Path(base).is_dir():
            raise
        # A folder that is gone, such as runs/projector, looks like a repository.
        raise FileNotFoundError(f"{missing_base} Nor is it a repository that the Hub gives: {error}") from error
    processor = Med3DVLMProcessor.from_pretrained(adapter)
    peft_model = PeftModel.from_pretrained(model, adapter)
    check_adapter_fits(peft_model, weights, adapter)
    merged = peft_model.merge_and_unload(safe_merge=True)
    return publish(merged, destination, processor=processor, overwrite=overwrite, training_record=record, **fields)


def describe_merged(adapter: str, base: str) -> dict[str, Any]:
    """
    What the cards of an adapter and of its base say that holds for both together.

    Training data and data sets are those of both, since the merged weights come from both. Notes and licence are the
    adapter's alone, as those of the base are about other weights; the language is the base's if the adapter names none. The
    base model is the base, if it is a repository, else what the base was trained from.

    Args:
        adapter (`str`), base (`str`):
            Folders, or repositories, of whose cards nothing is taken.

    Returns:
        `dict`: fields of [`~hub_cards.model_card.CardFields`], those that are known.

    Raises:
        ValueError: the metadata of a card cannot be read.
    """
    of_adapter = read_adapter_card(adapter)
    old_card = read_current_card(Path(base))
    of_base = {} if old_card is None else old_card.fields
    training_data = [of_adapter.pop("training_data", "")]
    if "training_data" in of_base:
        training_data = [training_data[0] or f"Of the adapter: {NOT_STATED.lower()}"]
        training_data.append(f"{BASE_BEGINS} {of_base['training_data']}")
    data_sets = [*listed(of_base.get("datasets")), *listed(of_adapter.pop("datasets", None))]
    return stated_fields(
        {
            "base_model": base if is_repository(base) else of_base.get("base_model"),
            "language": of_base.get("language"),
            **of_adapter,
            "datasets": list(dict.fromkeys(data_sets)) or None,
            "training_data": "\n\n".join(filter(None, training_data)) or None,
        }
    )


def read_adapter_card(adapter: str) -> dict[str, Any]:
    """
    What the card of an adapter says beyond the adapter itself; nothing where it is not of [`publish_adapter`].

    Raises:
        ValueError: its metadata cannot be read.
    """
    path = Path(adapter) / CARD_NAME
    try:
        text = ADAPTER_TEXT.search(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return {}
    card = None if text is None else read_card(path)  # the metadata of another make may be anything
    if card is None or text is None:
        return {}
    metadata, _ = card
    names = ("license", "license_name", "license_link", "language", "datasets")
    fields = {name: metadata.get(name) for name in names}
    return {name: value for name, value in {**fields, **text.groupdict()}.items() if value}


def listed(value: str | list[str] | None) -> list[str]:
    """What metadata give as one text or as a list, as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def read_adapter_weights(adapter: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file of weights is damaged.
    """
    from peft.utils import load_peft_weights

    try:
        return load_peft_weights(adapter, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{adapter}: its weights are damaged or cut short ({error}). Copy them again.") from error


def check_adapter_fits(peft_model: Any, weights: dict[str, Any], name: str) -> None:
    """
    peft loads what fits and warns about the rest; here every tensor must have found its place.

    Raises:
        ValueError: tensors are missing or left over; the message names them.
    """
    from peft import get_peft_model_state_dict

    expected, found = set(get_peft_model_state_dict(peft_model)), set(weights)
    faults = [
        f"{len(keys)} {kind}: {', '.join(sorted(keys)[:10])}"
        for kind, keys in {"missing": expected - found, "not part of the model": found - expected}.items()
        if keys
    ]
    if faults:
        raise ValueError(f"The adapter {name!r} does not fit its base model: {'; '.join(faults)}.")


__all__ = [
    "check_adapter_fits",
    "describe_merged",
    "merge_adapter",
    "publish_adapter",
    "read_adapter_card",
    "read_adapter_weights",
]
