"""Answers and embeddings of a model for many samples, in batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .data.collate import PREPARED, PairCollator, stack_volumes
from .data.dataset import STAND_IN, PairBuilder, VolumeLoader
from .prompts import build_messages, format_question


@torch.inference_mode()
def answer_samples(
    model: Any,
    processor: Any,
    samples: datasets.Dataset,
    volumes: VolumeLoader,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    show_progress: bool = False,
) -> list[str]:
    """
    Asks the model what each sample asks, and returns what it says, decoded greedily.

    Args:
        model ([`Med3DVLMForConditionalGeneration`] or a `peft.PeftModel` of one):
            Asked in evaluation mode; its mode is restored.
        processor ([`Med3DVLMProcessor`]):
            The model's processor.
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES`.
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to 16):
            Questions at a time. Those about one volume that are asked together share its encoding, so samples are best given
            case by case.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[str]`, an answer for each sample.
    """
    was_training = model.training
    model.eval()
    tokenizer = processor.tokenizer
    answers: list[str] = []
    try:
        for rows in batched(samples, batch_size, show_progress, "answering"):
            images = list(dict.fromkeys(row["image"] for row in rows))
            pixel_values = stack_volumes([{"volume": volumes.load(image)} for image in images])
            features = model.get_image_features(pixel_values.to(model.device, model.dtype), return_dict=True)
            # All questions about a volume share its encoding.
            places = torch.tensor([images.index(row["image"]) for row in rows], device=features.pooler_output.device)
            inputs = processor.apply_chat_template(
                [build_messages(STAND_IN, format_question(row)) for row in rows],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={**PREPARED, "padding": True},
            ).to(model.device)
            generated = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features.pooler_output[places])},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end_token_ids(tokenizer),
                pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            )
            new_tokens = generated[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    finally:
        model.train(was_training)
    return answers


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: that of the end of a turn, which training teaches, and that of the end of a text."""
    ids = [tokenizer.get_vocab().get("<|im_end|>"), tokenizer.eos_token_id]
    return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]


@torch.inference_mode()
def embed_samples(
    model: Any,
    processor: Any,
    samples: datasets.Dataset,
    volumes: VolumeLoader,
    max_text_length: int = 512,
    batch_size: int = 16,
    show_progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Vectors of the volumes and of the reports of samples.

    Args:
        model ([`DCFormerSiglipModel`]):
            Used in evaluation mode; its mode is restored.
        processor ([`Med3DVLMProcessor`]):
            The model's processor.
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES` with the task "report".
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        max_text_length (`int`, *optional*, defaults to 512):
            Tokens of a report.
        batch_size (`int`, *optional*, defaults to 16):
            Pairs at a time.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        Two `torch.Tensor` of shape `(num_samples, projection_dim)`, of unit length, on the CPU: volumes and texts.
    """
    was_training = model.training
    model.eval()
    builder = PairBuilder(processor.tokenizer, max_text_length, is_drawn=False)
    collate = PairCollator(processor, max_text_length)
    image_embeds, text_embeds = [], []
    try:
        for rows in batched(samples, batch_size, show_progress, "embedding"):
            generator = torch.Generator()  # nothing is drawn: the first sentences of a text are kept
            inputs = collate([builder(row, volumes.load(row["image"]), generator) for row in rows])
            inputs["return_loss"] = False
            inputs = {
                name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()
            }
            outputs = model(**inputs)
            image_embeds.append(outputs.image_embeds.float().cpu())
            text_embeds.append(outputs.text_embeds.float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(image_embeds), torch.cat(text_embeds)


def batched(
    samples: datasets.Dataset | Sequence[dict[str, Any]], batch_size: int, show_progress: bool, description: str
) -> Iterator[list[dict[str, Any]]]:
    """Rows of `samples` in lists of at most `batch_size`."""
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc=description, disable=not show_progress, leave=False):
        yield [samples[index] for index in range(start, min(start + batch_size, len(samples)))]


__all__ = ["answer_samples", "batched", "embed_samples", "end_token_ids"]
