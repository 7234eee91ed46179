"""From samples to training items: volumes decoded when they are needed, and every random choice fixed by seed, epoch, sample.

Nothing is drawn from a global generator. So the same seed gives the same items whatever the number of workers and processes,
and a resumed run goes on with the items that an uninterrupted one would have seen.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..prompts import build_messages, build_text_messages, describe_case, format_answer, format_question
from .augmentation import Augmentation
from .preparation_record import check_not_prepared
from .slices import open_scan
from .text import keep_whole_sentences


# Takes the place of a volume in a conversation to learn. The processor only has to lay out the text around it: the volume is
# prepared already, and after augmentation need not be in [0, 1], which the processor would refuse.
STAND_IN = torch.linspace(0, 1, 8).reshape(2, 2, 2)


class VolumeLoader(Protocol):
    """Anything that brings the volume at a path to `(depth, height, width)`, in [0, 1], such as a `VolumeCache`."""

    def load(self, path: str) -> torch.Tensor: ...


# Makes a training item of a sample, its volume of shape `(depth, height, width)`, and the item's own random numbers.
ItemBuilder = Callable[[Mapping[str, Any], torch.Tensor, torch.Generator], dict[str, Any]]


class ProcessedVolumes:
    """
    Brings volumes through the image processor each time they are asked for.

    Args:
        image_processor ([`Med3DVLMImageProcessor`]):
            The one image processor.
        options (`dict`, *optional*):
            Options that replace the processor's own, for volumes that are prepared already.
    """

    def __init__(self, image_processor: Any, options: dict[str, Any] | None = None):
        self.image_processor, self.options = image_processor, options or {}

    def load(self, path: str) -> torch.Tensor:
        """
        The volume at `path`, a NIfTI file or a folder of slices: `torch.Tensor` of shape `(depth, height, width)`.

        Raises:
            InvalidVolumeError: it cannot be used.
            ValueError: it is a prepared volume, and the options are those of scans.
        """
        check_not_prepared(path, self.options)
        scan, _ = open_scan(path)
        return self.image_processor(scan, **self.options)["pixel_values"][0, 0]


class QuestionGroups:
    """
    Which samples are asked together, because they are about the same volume.

    Args:
        owners (`Sequence[str]`):
            For each sample what it is about.
        size (`int`):
            Most samples in a group. Those of an owner are shared out evenly, at random in every epoch.

    Raises:
        ValueError: `size` is below 1.
    """

    def __init__(self, owners: Sequence[str], size: int):
        if size < 1:
            raise ValueError(f"Expected at least 1 question per volume, got {size}.")
        members: dict[str, list[int]] = {}
        for row, owner in enumerate(owners):
            members.setdefault(owner, []).append(row)
        self.members = list(members.values())
        counts = [math.ceil(len(rows) / size) for rows in self.members]
        # Of each group: which owner's, which of the owner's groups, and how many these are.
        self.places = [(number, part, count) for number, count in enumerate(counts) for part in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def rows_of(self, index: int, seed: int, epoch: int) -> list[int]:
        """The samples of a group in an epoch. In each epoch every sample is in one group."""
        number, part, count = self.places[index]
        rows = self.members[number]
        # Beyond the numbers of the items and of their order.
        order = torch.randperm(len(rows), generator=item_generator(seed, epoch, len(self) + 1 + number))
        return [rows[place] for place in order[part::count].tolist()]


class DrawnDataset(Dataset):
    """
    What data sets of samples have in common: an index counts draws, and a draw is one sample, or a group of them, with the
    random numbers of an epoch. Index `epoch * len(dataset) + i` is sample, or group, `i` in that epoch, which [`EpochSampler`]
    makes use of; a plain index below the length is one in the epoch that has begun.

    Args:
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES`.
        seed (`int`):
            Seed of the random numbers.
        owners (`Sequence[str]`), questions_per_owner (`int`):
            What each sample is about, and how many samples of an owner make a group; 1 for none.
    """

    def __init__(self, samples: datasets.Dataset, seed: int, owners: Sequence[str], questions_per_owner: int):
        self.samples, self.seed = samples, seed
        self.groups = QuestionGroups(owners, questions_per_owner) if questions_per_owner > 1 else None
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers of a loader hear of it

    def begin_epoch(self, epoch: int) -> None:
        """
        Lets plain indices be of another epoch: for a plain Trainer, with the callback `TellEpoch(dataset.begin_epoch)`. The method
        is not called `set_epoch`, because loaders call a method of that name by themselves, in validations too.
        """
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples if self.groups is None else self.groups)

    def draw(self, draw: int) -> tuple[list[dict[str, Any]], torch.Generator]:
        """
        The samples of a draw, and its random numbers.

        Raises:
            IndexError: a negative index.
        """
        if draw < 0:
            raise IndexError(f"Expected an index from 0, got {draw}.")
        epoch, index = divmod(draw, len(self)) if draw >= len(self) else (int(self.epoch), draw)
        rows = [index] if self.groups is None else self.groups.rows_of(index, self.seed, epoch)
        return [self.samples[row] for row in rows], item_generator(self.seed, epoch, index)


class StudyDataset(DrawnDataset):
    """
    Training items of samples.

    Indices count draws, see [`DrawnDataset`]. Train with [`~train.trainers.StudyTrainer`], or with a plain Trainer and the callback
    [`~train.trainers.TellEpoch`], without which each epoch draws the same prompts and augmentation.

    Args:
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES`.
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        build_item (`Callable`):
            Makes the item, see [`ConversationBuilder`] and [`PairBuilder`].
        augmentation (`Callable`, *optional*):
            Changes a volume at random.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random numbers.
        questions_per_volume (`int`, *optional*, defaults to 1):
            With 2 or more, an item has up to so many conversations about one volume, which then is loaded, changed and
            encoded once for all of them. `build_item` is a [`ConversationBuilder`] then.
    """

    def __init__(
        self,
        samples: datasets.Dataset,
        volumes: VolumeLoader,
        build_item: ItemBuilder,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        questions_per_volume: int = 1,
    ):
        super().__init__(samples, seed, samples["image"], questions_per_volume)
        self.volumes, self.build_item, self.augmentation = volumes, build_item, augmentation

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """
        What `build_item` makes; of a group `{"conversations": [messages, ...], "volume": ...}`.

        Raises:
            IndexError: a negative index.
            InvalidVolumeError: the volume cannot be used. It is not replaced by another.
        """
        samples, generator = self.draw(draw)
        volume = self.volumes.load(samples[0]["image"])
        if self.augmentation is not None:
            volume = self.augmentation(volume, generator)
        items = [self.build_item(sample, volume, generator) for sample in samples]
        if self.groups is None:
            return items[0]
        return {"conversations": [item["messages"] for item in items], "volume": volume}


class TextDataset(DrawnDataset):
    """
    The conversations of samples with a text in the place of the volume, for a language model that is to learn to answer
    before it sees volumes. No volume is read.

    Indices count draws, as those of [`StudyDataset`].

    Args:
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES`. What they tell of a case together stands for its volume, see
            [`~train.prompts.describe_case`].
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice among the requests for a report.
        questions_per_volume (`int`, *optional*, defaults to 1):
            With 2 or more, an item has up to so many conversations about one case, whose description is then read once.
    """

    def __init__(self, samples: datasets.Dataset, seed: int = 0, questions_per_volume: int = 1):
        super().__init__(samples.remove_columns("image"), seed, samples["case"], questions_per_volume)
        cases: dict[str, list[dict[str, Any]]] = {}
        for sample in self.samples:
            cases.setdefault(sample["case"], []).append(sample)
        self.descriptions = {case: describe_case(members) for case, members in cases.items()}

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """
        `{"messages": ...}`, of a group `{"conversations": [messages, ...]}`.

        Raises:
            IndexError: a negative index.
        """
        samples, generator = self.draw(draw)
        conversations = []
        for sample in samples:
            description, question = self.descriptions[sample["case"]], format_question(sample, generator)
            conversations.append(build_text_messages(description, question, format_answer(sample)))
        return {"messages": conversations[0]} if self.groups is None else {"conversations": conversations}


def item_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one sample in one epoch."""
    state = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))  # torch takes seeds below 2**63


class EpochSampler(Sampler[int]):
    """
    Order of the samples in each epoch, as draws of a [`StudyDataset`].

    Args:
        length (`int`):
            Number of samples, or of groups of them.
        seed (`int`):
            Seed of the order, which is different in every epoch and the same in every process.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to shuffle.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True):
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.length
        if not self.shuffle:
            yield from range(first, first + self.length)
            return
        order = torch.randperm(self.length, generator=item_generator(self.seed, self.epoch, self.length))
        for index in order.tolist():
            yield first + index


class ConversationBuilder:
    """Makes of a sample the conversation to learn: the question about the volume, and the answer."""

    def __call__(self, sample: Mapping[str, Any], volume: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
        """`{"messages": ..., "volume": tensor of shape (depth, height, width)}`."""
        question = format_question(sample, generator)
        return {"messages": build_messages(STAND_IN, question, format_answer(sample)), "volume": volume}


class PairBuilder:
    """
    Makes of a report sample the pair to align: volume and text, cut to whole sentences where it is too long.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the text encoder.
        max_length (`int`):
            Tokens a text may have, special ones included.
        is_drawn (`bool`, *optional*, defaults to `True`):
            Whether the sentences kept of a text that is too long are drawn, for variety in training, or the first ones.
        draw_similar (`Callable`, *optional*):
            Given a report and a `torch.Generator`, further reports that are negatives in the loss, such as those of
            [`~train.data.similarity.SimilarReports`].
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        is_drawn: bool = True,
        draw_similar: Callable[[str, torch.Generator], list[str]] | None = None,
    ):
        self.tokenizer, self.max_length, self.is_drawn = tokenizer, max_length, is_drawn
        self.draw_similar = draw_similar

    def __call__(self, sample: Mapping[str, Any], volume: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
        """
        `{"text": ..., "volume": tensor of shape (depth, height, width), "text_group_id": ...}`, where the last is the same
        for identical reports; and with `draw_similar` the lists `similar_texts` and `similar_group_ids`, without what is cut
        to the pair's own text.
        """
        report = sample["answer"]
        pair: dict[str, Any] = {
            "text": self._cut(report, generator),
            "volume": volume,
            "text_group_id": text_group_id(report),
        }
        if self.draw_similar is not None:
            cut = {self._cut(other, generator): text_group_id(other) for other in self.draw_similar(report, generator)}
            cut.pop(pair["text"], None)
            pair["similar_texts"], pair["similar_group_ids"] = list(cut), list(cut.values())
        return pair

    def _cut(self, report: str, generator: torch.Generator) -> str:
        return keep_whole_sentences(report, self.tokenizer, self.max_length, generator if self.is_drawn else None)


def text_group_id(text: str) -> int:
    """A number of 63 bits that is the same for the same words, whatever the white space between them."""
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


__all__ = [
    "ConversationBuilder",
    "DrawnDataset",
    "EpochSampler",
    "ItemBuilder",
    "PairBuilder",
    "ProcessedVolumes",
    "QuestionGroups",
    "StudyDataset",
    "TextDataset",
    "VolumeLoader",
    "item_generator",
    "text_group_id",
]
