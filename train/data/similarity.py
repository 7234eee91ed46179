"""Batches in which reports resemble each other, so that a contrastive loss has to tell them apart by what differs."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from .dataset import EpochSampler, item_generator, text_group_id


# Similar reports are looked for among so many at a time, drawn anew in each epoch.
POOL_SIZE = 4096
# And first among the nearest so many of these.
NUM_NEAREST = 64
# Of the vectors of reports. With more different words than this they are random projections, which keep angles roughly.
NUM_FEATURES = 512
WORD = re.compile(r"\w+")


def vectors_of_reports(reports: Sequence[str]) -> torch.Tensor:
    """
    Which words a report has, each weighted by the logarithm of how rare it is (inverse document frequency).

    Args:
        reports (`Sequence[str]`):
            Texts.

    Returns:
        `torch.Tensor` of shape `(len(reports), features)`, of length 1 each.
    """
    words = [sorted(set(WORD.findall(report.lower()))) for report in reports]
    counts = Counter(word for own in words for word in own)
    places = {word: place for place, word in enumerate(counts)}
    rows = [row for row, own in enumerate(words) for _ in own]
    columns = [places[word] for own in words for word in own]
    # 1 more than the usual, so that a word that all reports have counts too.
    weights = [1 + math.log(len(reports) / counts[word]) for own in words for word in own]
    size = (len(reports), len(counts))
    matrix = torch.sparse_coo_tensor(torch.tensor([rows, columns]), torch.tensor(weights), size, check_invariants=True)
    if len(counts) > NUM_FEATURES:
        generator = torch.Generator().manual_seed(0)
        vectors = matrix @ torch.randn(len(counts), NUM_FEATURES, generator=generator)
    else:
        vectors = matrix.to_dense()
    return torch.nn.functional.normalize(vectors, dim=1)


class SimilarReportSampler(EpochSampler):
    """
    An order in which similar reports follow each other in small groups, of texts that differ, drawn anew in each epoch.

    In a batch of reports drawn at random nearly all differ in many things, and a contrastive loss needs only the most
    conspicuous of them to tell them apart. Neighbours here differ in little: hard negatives (see Kalantidis et al. 2020,
    "Hard Negative Mixing for Contrastive Learning", for why they matter).

    Args:
        reports (`Sequence[str]`):
            Of the samples.
        seed (`int`):
            Of the order. Different in every epoch, the same in every process.
        group_size (`int`):
            Reports in a group. A batch holds several groups, so that it has other reports as well.
    """

    def __init__(self, reports: Sequence[str], seed: int, group_size: int):
        super().__init__(len(reports), seed)
        self.group_size = group_size
        self.texts = [text_group_id(report) for report in reports]
        self.vectors = vectors_of_reports(reports)

    def __iter__(self) -> Iterator[int]:
        first, generator = self.epoch * self.length, item_generator(self.seed, self.epoch, self.length)
        groups: list[list[int]] = []
        for pool in torch.randperm(self.length, generator=generator).split(POOL_SIZE):
            groups += self._group(pool)
        for place in torch.randperm(len(groups), generator=generator).tolist():
            yield from (first + row for row in groups[place])

    def _group(self, pool: torch.Tensor) -> list[list[int]]:
        """Each report that is left, in turn, with those left that are most like it, each text once where there are others."""
        similarities = self.vectors[pool] @ self.vectors[pool].T
        nearest = similarities.topk(min(len(pool), NUM_NEAREST), dim=1).indices.tolist()
        texts = [self.texts[row] for row in pool.tolist()]
        is_left = [True] * len(pool)
        groups = []
        for place, near in enumerate(nearest):
            if not is_left[place]:
                continue
            members = self._choose(place, near, texts, is_left)
            if len(members) < self.group_size:  # all near ones are taken
                members = self._choose(place, similarities[place].argsort(descending=True).tolist(), texts, is_left)
            for member in members:
                is_left[member] = False
            groups.append(pool[members].tolist())
        return groups

    def _choose(self, place: int, order: list[int], texts: list[int], is_left: list[bool]) -> list[int]:
        members, same = [place], list[int]()
        for other in order:
            if len(members) == self.group_size:
                break
            if is_left[other] and other != place:
                is_new = all(texts[other] != texts[member] for member in members)
                (members if is_new else same).append(other)
        return members + same[: self.group_size - len(members)]


__all__ = ["SimilarReportSampler", "vectors_of_reports"]
