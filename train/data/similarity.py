"""Which reports resemble each other, so that a contrastive loss can be shown what differs in them."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from .dataset import text_group_id


# Of the vectors of reports. With more different words than this they are random projections, which keep angles roughly.
NUM_FEATURES = 512
# Similar reports are drawn from so many times as many nearest ones, for variety.
POOL_RATIO = 2
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


class SimilarReports:
    """
    Draws reports that resemble a given one, of other words.

    Nearly all reports drawn at random differ from a given one in many things, and a contrastive loss needs only the most
    conspicuous of them. Those drawn here differ in little: hard negatives, as in Yuksekgonul et al., "When and why
    vision-language models behave like bags-of-words" (2023), but real reports instead of altered ones.

    Args:
        reports (`Iterable[str]`):
            To draw from; repetitions count once.
        count (`int`):
            Reports to draw at a time, from the `2 * count` most similar ones.

    Raises:
        ValueError: there are not so many different reports.
    """

    def __init__(self, reports: Iterable[str], count: int):
        self.reports, self.count = list({text_group_id(report): report for report in reports}.values()), count
        if count >= len(self.reports):
            raise ValueError(
                f"Expected more than {count} different reports, to draw {count} similar ones, got {len(self.reports)}: make "
                "`data.similar_reports` smaller."
            )
        self.rows = {text_group_id(report): row for row, report in enumerate(self.reports)}
        self.vectors = vectors_of_reports(self.reports)

    def __call__(self, report: str, generator: torch.Generator) -> list[str]:
        """
        Args:
            report (`str`):
                One of the reports.
            generator (`torch.Generator`):
                Source of the draws.

        Returns:
            `list[str]`: different reports, none of them the given one.
        """
        own = self.rows[text_group_id(report)]
        similarities = self.vectors @ self.vectors[own]
        similarities[own] = -math.inf
        nearest = similarities.topk(min(POOL_RATIO * self.count, len(self.reports) - 1)).indices
        drawn = torch.randperm(len(nearest), generator=generator)[: self.count]
        return [self.reports[row] for row in nearest[drawn].tolist()]


__all__ = ["SimilarReports", "vectors_of_reports"]
