"""Answers and embeddings of a model for many samples, in batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..hub_cards.publish import end_token_ids
from ..modeling_med3dvlm.modeling_med3dvlm import CACHE_NAME
from .data.collate import PROCESSED, PairCollator, stack_volumes
from .data.dataset import STAND_IN, PairBuilder, VolumeLoader
from .prompts import build_messages, format_question


Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """
    What a model said.

    Args:
        text (`str`): The answer, without special tokens and white space at its ends.
        probability (`float`): That the model gives to the whole answer: the product over its tokens, the end included; in [0, 1],
            or NaN, if the model's logits are.
    """

    text: str
    probability: float


def answer_samples(
    model: Any,
    processor: Any,
    samples: datasets.Dataset,
    volumes: VolumeLoader,
    max_new_tokens: int = 128,
    batch_size: int = 16,
) -> list[str]:
    """
    Asks the model what each sample asks, and returns what it says, in the order of the samples: see [`iterate_answers`].
    """
    batches = iterate_answers(model, processor, samples, volumes, max_new_tokens, batch_size)
    return [answer.text for _, answers in batches for answer in answers]


def check_finite_answers(probabilities: Mapping[str, float]) -> None:
    """
    Checks the probabilities of answers, by the ids of what was asked: greedy decoding takes some token of logits that are NaN too.

    Raises:
        ValueError: one is not finite.
    """
    lost = [name for name, probability in probabilities.items() if not math.isfinite(probability)]
    if lost:
        raise ValueError(
            f"{lost[0]}: the model's logits are NaN, so that its answer means nothing. Look for NaN in the model's weights and in "
            "the volume; float16 may have overflowed: take --dtype bfloat16 or float32, in another folder."
        )


def iterate_answers(
    model: Any,
    processor: Any,
    samples: datasets.Dataset | Sequence[Row],
    volumes: VolumeLoader,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    show_progress: bool = False,
) -> Iterator[tuple[list[Row], list[Answer]]]:
    """
    Asks the model what each sample asks, decoded greedily, batch by batch: at each step the most probable token, whatever
    penalties and beams the model's generation config has.

    Questions about one volume that follow each other come in one batch and share its encoding, so samples are best given case
    by case. The volumes of the next batch are loaded while the model is busy with one.

    Args:
        model ([`Med3DVLMForConditionalGeneration`] or a `peft.PeftModel` of one):
            Asked in evaluation mode; its mode is restored.
        processor ([`Med3DVLMProcessor`]):
            The model's processor.
        samples (`datasets.Dataset` or `Sequence`):
            Rows of `SAMPLE_FEATURES`.
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to 16):
            Most questions at a time.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Yields:
        The rows of a batch, and their answers.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"Expected a batch of at least 1 question, got {batch_size}.")
    was_training = model.training
    model.eval()

    def load(rows: list[Row]) -> dict[str, torch.Tensor]:
        return {image: volumes.load(image) for image in dict.fromkeys(row["image"] for row in rows)}

    batches = batch_by_volume(samples, batch_size)
    try:
        with (
            ThreadPoolExecutor(1) as pool,
            tqdm(total=len(samples), desc="answering", disable=not show_progress) as bar,
        ):
            rows = next(batches, None)
            loading = None if rows is None else pool.submit(load, rows)
            while rows is not None and loading is not None:
                loaded, answered = loading.result(), rows
                rows = next(batches, None)
                loading = None if rows is None else pool.submit(load, rows)
                yield answered, answer_batch(model, processor, answered, loaded, max_new_tokens)
                bar.update(len(answered))
    finally:
        model.train(was_training)


def batch_by_volume(samples: datasets.Dataset | Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """
    Rows in lists of at most `batch_size`. Rows of one volume that follow each other are parted only if they are more than that.
    """
    batch: list[Row] = []
    group: list[Row] = []
    for row in (samples[index] for index in range(len(samples))):
        if group and (row["image"] != group[0]["image"] or len(group) == batch_size):
            if len(batch) + len(group) > batch_size:
                yield batch
                batch = []
            batch, group = batch + group, []
        group.append(row)
    if batch and len(batch) + len(group) > batch_size:
        yield batch
        batch = []
    if batch or group:
        yield batch + group


@torch.inference_mode()
def answer_batch(
    model: Any, processor: Any, rows: Sequence[Row], volumes: dict[str, torch.Tensor], max_new_tokens: int
) -> list[Answer]:
    """
    Answers to rows, decoded greedily together.

    A volume goes through the encoder, the projector and the language model once, however many rows ask about it: what comes
    before the questions, the volume's tokens above all, is their common prefix, whose keys and values are copied. Shorter
    questions are padded between prefix and question, where the attention mask hides the padding and positions do not count
    it, so an answer is that of its question alone.

    Args:
        model, processor:
            As for [`iterate_answers`].
        rows (`Sequence[dict]`):
            Of `SAMPLE_FEATURES`.
        volumes (`dict[str, torch.Tensor]`):
            The volume of shape `(depth, height, width)` for each path in `image`.
        max_new_tokens (`int`):
            Longest answer, in tokens.

    Returns:
        `list[Answer]`, one for each row.
    """
    tokenizer, device = processor.tokenizer, model.device
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids: list[list[int]] = processor.apply_chat_template(
        [build_messages(STAND_IN, format_question(row)) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={**PROCESSED},
    )["input_ids"]
    lengths = [prefix_length(ids, processor.image_token_id) for ids in input_ids]
    keys = [(row["image"], tuple(ids[:length])) for row, ids, length in zip(rows, input_ids, lengths)]
    prefixes = list(dict.fromkeys(keys))
    owners = torch.tensor([prefixes.index(key) for key in keys], device=device)

    images = list(volumes)
    pixel_values = stack_volumes([{"volume": volumes[image]} for image in images]).to(device, model.dtype)
    image_tokens = model.get_image_features(pixel_values, return_dict=True).pooler_output
    image_tokens = image_tokens[
        torch.tensor([images.index(image) for image, _ in prefixes], device=image_tokens.device)
    ]
    prefix_ids, prefix_mask = pad_left([list(ids) for _, ids in prefixes], pad_token_id, device)
    outputs = model(
        input_ids=prefix_ids,
        attention_mask=prefix_mask,
        position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image_tokens)},
        use_cache=True,
        logits_to_keep=1,
        return_dict=True,
    )
    cache = getattr(outputs, CACHE_NAME)
    cache.batch_select_indices(owners)

    question_ids, question_mask = pad_left(
        [ids[length:] for ids, length in zip(input_ids, lengths)], pad_token_id, device
    )
    recorder = ProbabilityRecorder()
    end_ids = end_token_ids(tokenizer)
    generated = model.generate(
        input_ids=torch.cat([prefix_ids[owners], question_ids], dim=1),
        attention_mask=torch.cat([prefix_mask[owners], question_mask], dim=1),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=end_ids,
        pad_token_id=pad_token_id,
        logits_processor=LogitsProcessorList([recorder]),
        **{CACHE_NAME: cache},
    )
    new_tokens = generated[:, prefix_ids.shape[1] + question_ids.shape[1] :]
    texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return [Answer(text.strip(), value) for text, value in zip(texts, recorder.probabilities(new_tokens, end_ids))]


class ProbabilityRecorder(LogitsProcessor):
    """Notes the probability of the most probable token at each step, and changes nothing. The last of the processors."""

    def __init__(self) -> None:
        self.log_probabilities: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Takes and returns scores of shape `(batch_size, vocab_size)`."""
        self.log_probabilities.append(scores.float().log_softmax(-1).amax(-1))
        return scores

    def probabilities(self, new_tokens: torch.Tensor, end_ids: Sequence[int]) -> list[float]:
        """
        Products of the probabilities up to the first end.

        Args:
            new_tokens (`torch.Tensor` of shape `(batch_size, num_steps)`):
                What was generated.
            end_ids (`Sequence[int]`):
                Tokens that end an answer.

        Returns:
            `list[float]`, one for each answer.
        """
        values = torch.stack(self.log_probabilities, dim=1)
        is_end = torch.isin(new_tokens, torch.tensor(end_ids, device=new_tokens.device)).long()
        is_after_end = is_end.cumsum(1) - is_end > 0
        return values.masked_fill(is_after_end, 0).sum(1).exp().tolist()


def prefix_length(input_ids: Sequence[int], image_token_id: int) -> int:
    """Number of tokens up to the last placeholder of a volume."""
    return len(input_ids) - list(reversed(input_ids)).index(image_token_id)


def pad_left(sequences: list[list[int]], pad_token_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both of shape `(num_sequences, longest)`."""
    longest = max(map(len, sequences))
    ids = [[pad_token_id] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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


@torch.inference_mode()
def embed_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    max_text_length: int = 512,
    batch_size: int = 16,
    kind: str = "text",
) -> torch.Tensor:
    """
    Vectors of texts.

    Args:
        model ([`DCFormerSiglipModel`]):
            In evaluation mode.
        processor ([`Med3DVLMProcessor`]):
            The model's processor.
        texts (`Sequence[str]`):
            At least one; none is cut.
        max_text_length (`int`, *optional*, defaults to 512):
            Tokens that a text may have.
        batch_size (`int`, *optional*, defaults to 16):
            Texts at a time.
        kind (`str`, *optional*, defaults to `"text"`):
            What the error calls them.

    Returns:
        `torch.Tensor` of shape `(num_texts, projection_dim)`, of unit length, in float32 on the CPU.

    Raises:
        ValueError: a text has more than `max_text_length` tokens.
    """
    vectors = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        inputs = processor.tokenizer(batch, padding=True, padding_side="right", return_tensors="pt")
        for text, length in zip(batch, inputs["attention_mask"].sum(dim=1).tolist()):
            if length > max_text_length:
                raise ValueError(f"A {kind} has {length} tokens, more than {max_text_length}: shorten {text[:60]!r}.")
        features = model.get_text_features(
            inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device), return_dict=True
        )
        vectors.append(normalize(features.pooler_output.float(), dim=-1).cpu())
    return torch.cat(vectors)


def batched(
    samples: datasets.Dataset | Sequence[dict[str, Any]], batch_size: int, show_progress: bool, description: str
) -> Iterator[list[dict[str, Any]]]:
    """Rows of `samples` in lists of at most `batch_size`."""
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc=description, disable=not show_progress, leave=False):
        yield [samples[index] for index in range(start, min(start + batch_size, len(samples)))]


__all__ = [
    "Answer",
    "answer_batch",
    "answer_samples",
    "check_finite_answers",
    "embed_samples",
    "embed_texts",
    "end_token_ids",
    "iterate_answers",
]
