"""Uncertainty of scores, and signs that answers do not depend on the question."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    are_scores: bool = True,
) -> tuple[float, float]:
    """
    Percentile interval of the mean, by resampling with replacement (Efron 1979).

    Questions about one case share its volume, so their scores are not independent: with `clusters`, whole cases are drawn, and
    the interval is as wide as the number of cases, not of questions, warrants.

    Scores that are all 0, or all 1, are so in each draw, however few they are. Their interval ends at the exact bound of so many
    hits in a row (Clopper and Pearson 1934): of `n` clusters of 1, the share of which `n` hits have the probability
    `(1 - level) / 2`.

    Args:
        values (`Sequence[float]`):
            A score for each sample.
        clusters (`Sequence`, *optional*):
            Case of each sample; each sample is its own by default.
        groups (`Sequence`, *optional*):
            Type of each sample: the interval is then that of the mean over types of their means.
        level (`float`, *optional*, defaults to 0.95):
            Share of resampled means that lie within.
        num_resamples (`int`, *optional*, defaults to 2000):
            How often to draw.
        seed (`int`, *optional*, defaults to 0):
            Of the draws.
        are_scores (`bool`, *optional*, defaults to `True`):
            Whether the values are scores, of which 0 is the lowest and 1 the highest; differences are not.

    Returns:
        `tuple[float, float]`: the lower and the upper end; NaN for values of fewer than two clusters, which do not show how much
        others would differ.

    Raises:
        ValueError: `level` is not between 0 and 1, or `clusters` or `groups` has another length.

    Example:

    ```python
    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> 0.39 < low < 0.42 and 0.58 < high < 0.61
    True
    ```"""
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    for name, labels in {"cluster": clusters, "group": groups}.items():
        if labels is not None and len(labels) != len(values):
            raise ValueError(f"Expected a {name} for each of {len(values)} values, got {len(labels)}.")
    if len(values) == 0:
        return float("nan"), float("nan")
    rows = _numbered(range(len(values)) if clusters is None else clusters)
    columns = _numbered([0] * len(values) if groups is None else groups)
    if rows.max() == 0:
        return float("nan"), float("nan")
    num_clusters = int(rows.max()) + 1
    if are_scores and values[0] in (0, 1) and all(value == values[0] for value in values):
        bound = ((1 - level) / 2) ** (1 / num_clusters)
        return (bound, 1.0) if values[0] else (0.0, 1 - bound)
    # Of each cluster (row) and group (column): the sum and the number of its values.
    sums = np.zeros((num_clusters, columns.max() + 1))
    sizes = np.zeros_like(sums)
    np.add.at(sums, (rows, columns), np.asarray(values, dtype=float))
    np.add.at(sizes, (rows, columns), 1.0)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, 100):  # in blocks: all draws at once would need gigabytes for large studies
        drawn = generator.integers(num_clusters, size=(min(100, num_resamples - start), num_clusters))
        # How often each draw has each cluster.
        places = drawn + num_clusters * np.arange(len(drawn))[:, None]
        weights = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        with np.errstate(invalid="ignore"):  # a group that a draw has no sample of has no mean there
            means[start : start + len(drawn)] = np.nanmean(weights @ sums / (weights @ sizes), axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _numbered(labels: Iterable[Any]) -> np.ndarray:
    """Numbers from 0 for labels, equal ones the same, in the order they occur."""
    names: dict[Any, int] = {}
    return np.array([names.setdefault(label, len(names)) for label in labels])


def describe_answers(answers: Sequence[str]) -> dict[str, float]:
    """
    Signs of template collapse: a model that gives everybody the same answer can score well on similar references.

    Args:
        answers (`Sequence[str]`):
            What a model said.

    Returns:
        `dict` with `distinct_share`, different answers per answer; `most_common_share`, the share of the most frequent one;
        `empty_share`; `mean_words`; and `repetition`, the share of runs of four words within an answer that it has said
        before, as the mean over answers.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("Expected answers to describe, got none.")
    counts = Counter(" ".join(answer.split()) for answer in answers)
    words = [answer.split() for answer in answers]
    return {
        "distinct_share": len(counts) / len(answers),
        "most_common_share": counts.most_common(1)[0][1] / len(answers),
        "empty_share": counts[""] / len(answers),
        "mean_words": sum(map(len, words)) / len(answers),
        "repetition": sum(_repetition(entry) for entry in words) / len(answers),
    }


def _repetition(words: list[str], order: int = 4) -> float:
    runs = [tuple(words[start : start + order]) for start in range(len(words) - order + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


__all__ = ["bootstrap_interval", "describe_answers"]
