"""Which reports resemble each other, so that a contrastive loss can be shown what differs in them."""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from ..prompts import words_of
from .dataset import text_group_id


# Of the vectors of reports. With more different words than this they are random projections, which keep angles roughly.
NUM_FEATURES = 512
# Similar reports are drawn from so many times as many nearest ones, for variety.
POOL_RATIO = 2
# From here on the words are the same, but for their order, case and number.
SAME_WORDS = 1 - 1e-5
# Pairs of reports compared at a time: a few hundred megabytes.
PAIRS_AT_ONCE = 10_000_000


def vectors_of_reports(reports: Sequence[str]) -> torch.Tensor:
    """
    Which words a report has, each weighted by the logarithm of how rare it is (inverse document frequency).

    Args:
        reports (`Sequence[str]`):
            Texts.

    Returns:
        `torch.Tensor` of shape `(len(reports), features)`, of length 1 each.
    """
    words = [sorted(set(words_of(report))) for report in reports]
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


class SimilarReports:
    """
    Draws reports of other cases that resemble a given one, and are of other words.

    Nearly all reports drawn at random differ from a given one in many things, and a contrastive loss needs only the most
    conspicuous of them. Those drawn here differ in little: hard negatives, as in Yuksekgonul et al., "When and why
    vision-language models behave like bags-of-words" (2023), but real reports instead of altered ones.

    Args:
        reports (`Sequence[str]`):
            To draw from; repetitions count once.
        cases (`Sequence[str]`):
            Their cases. Reports of one case may all be true of it, and none is drawn for another. (Where a case has several,
            one that is drawn for another case may still meet its own in a batch.)
        count (`int`):
            Reports to draw at a time, from the `2 * count` most similar ones.

    Raises:
        ValueError: a report has not so many others.
    """

    def __init__(self, reports: Sequence[str], cases: Sequence[str], count: int):
        self.count, self.reports, self.rows = count, list[str](), dict[int, int]()
        of_case: dict[str, set[int]] = {}
        for report, case in zip(reports, cases, strict=True):
            row = self.rows.setdefault(text_group_id(report), len(self.rows))
            if row == len(self.reports):
                self.reports.append(report)
            of_case.setdefault(case, set()).add(row)
        excluded: list[set[int]] = [set() for _ in self.reports]
        for rows in of_case.values():
            for row in rows:
                excluded[row] |= rows
        self.neighbours = self._find_neighbours(excluded)

    def _find_neighbours(self, excluded: list[set[int]]) -> torch.Tensor:
        """
        The rows of the reports most similar to each, `(num_reports, at most 2 * count)`, -1 where there are no more. Found once, and
        as whole numbers with ties by row, so that neither workers nor the number of threads decide what is drawn.
        """
        vectors, total = vectors_of_reports(self.reports), len(self.reports)
        width = min(POOL_RATIO * self.count, total)
        found = []
        for rows in torch.arange(total).split(max(1, PAIRS_AT_ONCE // total)):
            similarities = vectors[rows] @ vectors.T
            steps = ((1 + similarities) * 10_000).round().long()
            scores = steps * total + (total - 1 - torch.arange(total))
            scores[similarities > SAME_WORDS] = -1
            for place, row in enumerate(rows.tolist()):
                scores[place, list(excluded[row])] = -1
            highest, nearest = scores.topk(width, dim=1)
            found.append(nearest.masked_fill(highest < 0, -1))
        neighbours = torch.cat(found).int()
        numbers = (neighbours >= 0).sum(dim=1)
        if numbers.min() < self.count:
            raise ValueError(
                f"Expected at least {self.count} reports of other cases and of other words for each report, to draw "
                f"{self.count} similar ones, got {int(numbers.min())} for one of {total} different reports: make "
                "`data.similar_reports` smaller."
            )
        return neighbours

    def __call__(self, report: str, generator: torch.Generator) -> list[str]:
        """
        Args:
            report (`str`):
                One of the reports.
            generator (`torch.Generator`):
                Source of the draws.

        Returns:
            `list[str]`: `count` different reports.

        Raises:
            KeyError: `report` is none of them.
        """
        nearest = self.neighbours[self.rows[text_group_id(report)]]
        nearest = nearest[nearest >= 0]
        drawn = torch.randperm(len(nearest), generator=generator)[: self.count]
        return [self.reports[row] for row in nearest[drawn].tolist()]


__all__ = ["SimilarReports", "vectors_of_reports"]
