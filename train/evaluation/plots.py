"""Pictures of an evaluation: bars by type of question, recall curves, and how far the confidence of answers can be trusted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import new_figure, save_png
from .scores import Score
from .tables import metric_title


# Of Okabe and Ito 2008, "Color Universal Design": told apart by colour-blind eyes too.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
BLIND_GREY, CHANCE_GREY = "0.72", "0.25"
SERIES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))
# Metrics of which the whole range matters: their axes go to 100 %.
WHOLE_RANGE = ("accuracy", "exact", "recall")


def draw_type_bars(
    scores: Sequence[Score], path: Path, published: Mapping[str, Mapping[str, float]] | None = None
) -> Path:
    """
    Draws the scores of one task: a panel for each metric, a bar for each type of question with its 95 % interval, and beside
    it the blind control, the chance level and a published figure, where there are such.

    Args:
        scores (`Sequence[Score]`):
            Of one task.
        path (`Path`):
            The PNG file.
        published (`Mapping`, *optional*):
            Figures of a paper in [0, 1], by metric and group.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: there are no scores, they are of several tasks, two are of one metric and group, one is not within [-1, 1],
            or a published figure belongs to none of them.
    """
    panels = _by_metric(scores)
    for metric, figures in (published or {}).items():
        if unknown := [name for name in figures if name not in panels.get(metric, {})]:
            raise ValueError(
                f"Published figures of {metric!r} for {', '.join(unknown)}, but scores only for "
                f"{', '.join(panels.get(metric, {})) or 'other metrics'}: leave them out."
            )
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = max(4.5, 1.5 + 0.8 * max(map(len, panels.values())))
    figure = new_figure(width * columns, 0.6 + 3.4 * rows)
    figure.suptitle(scores[0].task.replace("_", " "))
    for index, (metric, groups) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_bars(axes, metric, list(groups.values()), (published or {}).get(metric, {}))
    return save_png(figure, path)


def _by_metric(scores: Sequence[Score]) -> dict[str, dict[str, Score]]:
    tasks = sorted({score.task for score in scores})
    if len(tasks) != 1:
        raise ValueError(f"Expected scores of one task to draw, got {', '.join(tasks) or 'none'}.")
    panels: dict[str, dict[str, Score]] = {}
    for score in scores:
        if not -1 <= score.value <= 1:
            raise ValueError(f"Expected scores within [-1, 1], got {score.value} for {score.metric} of {score.group}.")
        groups = panels.setdefault(score.metric, {})
        if score.group in groups:
            raise ValueError(f"{score.metric} of {score.group} occurs twice: draw one evaluation at a time.")
        groups[score.group] = score
    return panels


def _draw_bars(axes: Any, metric: str, scores: Sequence[Score], published: Mapping[str, float]) -> None:
    has_blind = any(score.blind is not None for score in scores)
    width = 0.38 if has_blind else 0.6
    highest, lowest = 0.0, 0.0
    for place, score in enumerate(scores):
        first = place == 0
        left = place - width / 2 if has_blind else place
        value = 100 * score.value
        axes.bar(left, value, width, color=BLUE, label="model" if first else None, zorder=2)
        top = value
        if not (math.isnan(score.low) or math.isnan(score.high)):
            # The mean may lie outside of its own percentile interval by a rounding error; matplotlib refuses that.
            ends = [[max(0.0, value - 100 * score.low)], [max(0.0, 100 * score.high - value)]]
            axes.errorbar(left, value, yerr=ends, color="black", capsize=3, linewidth=1, zorder=4)
            top, lowest = max(value, 100 * score.high), min(lowest, 100 * score.low)
        axes.annotate(
            f"{value:.1f}", (left, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8
        )
        levels = [value, top]
        if score.blind is not None:
            label = None if any(earlier.blind is not None for earlier in scores[:place]) else "blind control"
            axes.bar(
                place + width / 2,
                100 * score.blind,
                width,
                color=BLIND_GREY,
                edgecolor="0.35",
                hatch="//",
                label=label,
                zorder=2,
            )
            levels.append(100 * score.blind)
        if score.chance is not None:
            label = None if any(earlier.chance is not None for earlier in scores[:place]) else "chance"
            axes.hlines(
                100 * score.chance,
                place - 0.47,
                place + 0.47,
                colors=CHANCE_GREY,
                linestyles="dashed",
                label=label,
                zorder=3,
            )
            levels.append(100 * score.chance)
        if score.group in published:
            label = None if any(earlier.group in published for earlier in scores[:place]) else "published"
            axes.plot(
                place,  # beside the figure above the model's bar
                100 * published[score.group],
                marker="D",
                linestyle="",
                color=ORANGE,
                markeredgecolor="black",
                label=label,
                zorder=5,
            )
            levels.append(100 * published[score.group])
        highest, lowest = max(highest, *levels), min(lowest, *levels)
    axes.set_xticks(range(len(scores)), [f"{score.group}\nn = {score.count}" for score in scores], fontsize=8)
    axes.set_title(metric_title(metric), fontsize=11)
    axes.set_xlabel("type of question, with the number of samples")
    axes.set_ylabel("score (%)")
    is_whole = any(word in metric for word in WHOLE_RANGE)
    axes.set_ylim(lowest * 1.1, 108 if is_whole else max(1.0, min(108, 1.25 * highest)))
    axes.set_xlim(-0.6, len(scores) - 0.4)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=4, frameon=False)


@dataclass(frozen=True)
class RecallCurve:
    """
    Recall over ranks, of one direction and size of gallery.

    Args:
        direction (`str`): Such as "volume to report".
        gallery_size (`int`): Pairs in a gallery.
        recalls (`Mapping[int, float]`): Recall in [0, 1] by rank `k`, from 1 to `gallery_size`.
        blind (`Mapping[int, float]`, *optional*): The same with the volume of another case.
    """

    direction: str
    gallery_size: int
    recalls: Mapping[int, float]
    blind: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, values in (("recalls", self.recalls), ("blind", self.blind or {})):
            for rank, value in values.items():
                if not 1 <= rank <= self.gallery_size or not 0 <= value <= 1:
                    raise ValueError(
                        f"`{name}` of {self.direction}: expected shares in [0, 1] by ranks from 1 to the size of the "
                        f"gallery, {self.gallery_size}, got {value} at rank {rank}."
                    )
        if not self.recalls:
            raise ValueError(f"`recalls` of {self.direction} with a gallery of {self.gallery_size} is empty.")

    @property
    def chance_levels(self) -> dict[int, float]:
        """Chance by rank: that the own report, or volume, is among the first `k` of a random order."""
        return {rank: rank / self.gallery_size for rank in range(1, self.gallery_size + 1)}


def draw_recall_curves(curves: Sequence[RecallCurve], path: Path) -> Path:
    """
    Draws recall over the rank: a panel for each direction, a line for each size of gallery, and in its colour the blind
    control (dotted) and chance (dashed).

    Args:
        curves (`Sequence[RecallCurve]`):
            What to draw.
        path (`Path`):
            The PNG file.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: there are no curves, or two of one direction and size.
    """
    panels: dict[str, dict[int, RecallCurve]] = {}
    for curve in curves:
        sizes = panels.setdefault(curve.direction, {})
        if curve.gallery_size in sizes:
            raise ValueError(f"{curve.direction} with a gallery of {curve.gallery_size} occurs twice.")
        sizes[curve.gallery_size] = curve
    if not panels:
        raise ValueError("Expected at least one recall curve to draw, got none.")
    figure = new_figure(5.2 * len(panels), 4.4)
    all_sizes = sorted({curve.gallery_size for curve in curves})
    for index, (direction, sizes) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for size, curve in sorted(sizes.items()):
            color, marker = SERIES[all_sizes.index(size) % len(SERIES)]
            label = f"gallery of {size}"
            axes.plot(*_points(curve.recalls), color=color, marker=marker, markersize=3.5, label=label, zorder=4)
            if curve.blind is not None:
                axes.plot(*_points(curve.blind), color=color, linestyle=":", label=f"{label}, blind", zorder=3)
            axes.plot(
                *_points(curve.chance_levels),
                color=color,
                linestyle="--",
                linewidth=1,
                alpha=0.7,
                label=f"{label}, chance",
                zorder=2,
            )
        axes.set_xscale("log")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if tick <= max(sizes)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_xlim(0.9, max(2, max(sizes)) * 1.1)
        axes.set_ylim(0, 103)
        axes.set_title(direction.replace("_", " "), fontsize=11)
        axes.set_xlabel("rank k (entries of the gallery)")
        axes.set_ylabel("recall at k (%)")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return save_png(figure, path)


def _points(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    ranks = sorted(values)
    return ranks, [100 * values[rank] for rank in ranks]


@dataclass(frozen=True)
class CalibrationBin:
    """
    Answers of similar confidence.

    Args:
        confidence (`float`): Their mean confidence, in [0, 1].
        accuracy (`float`): The share of them that is right.
        count (`int`): How many they are.
    """

    confidence: float
    accuracy: float
    count: int


def calibration_bins(confidences: Sequence[float], hits: Sequence[float], num_bins: int = 10) -> list[CalibrationBin]:
    """
    Divides answers by confidence into bins of equal count: they differ by at most one, unless confidences are equal. Equal ones
    stay together, in the bin of the middle one, so that the order of the answers changes nothing.

    Args:
        confidences (`Sequence[float]`):
            Probability in [0, 1] that the model gives to its answer.
        hits (`Sequence[float]`):
            Whether each answer is right: 0 or 1.
        num_bins (`int`, *optional*, defaults to 10):
            Bins; there are fewer if there are fewer different confidences.

    Returns:
        `list[CalibrationBin]`, from the lowest to the highest confidence.

    Raises:
        ValueError: there are no answers, the lengths differ, a confidence is not within [0, 1], a hit is neither 0 nor 1, or
            there is no bin.

    Example:

    ```python
    >>> from med3dvlm.train.evaluation.plots import calibration_bins

    >>> calibration_bins([0.9, 0.2, 0.8, 0.3], [1, 0, 0, 0], num_bins=2)
    [CalibrationBin(confidence=0.25, accuracy=0.0, count=2), CalibrationBin(confidence=0.85, accuracy=0.5, count=2)]
    ```"""
    trust, right = np.asarray(confidences, dtype=float), np.asarray(hits, dtype=float)
    if trust.ndim != 1 or trust.shape != right.shape or not len(trust):
        raise ValueError(f"Expected a hit for each of at least one confidence, got {right.shape} for {trust.shape}.")
    if not ((trust >= 0) & (trust <= 1)).all():
        raise ValueError(f"Expected confidences within [0, 1], got values from {trust.min()} to {trust.max()}.")
    if not np.isin(right, (0, 1)).all():
        raise ValueError("Expected hits that are 0 or 1, got others: use a metric that says right or wrong.")
    if num_bins < 1:
        raise ValueError(f"Expected at least one bin, got {num_bins}.")
    _, places, counts = np.unique(trust, return_inverse=True, return_counts=True)
    middle_ranks = np.cumsum(counts) - (counts + 1) / 2
    bins = np.floor(num_bins * middle_ranks / len(trust)).astype(int)[places]
    return [
        CalibrationBin(float(trust[chosen].mean()), float(right[chosen].mean()), int(chosen.sum()))
        for chosen in (bins == number for number in np.unique(bins))
    ]


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """
    Mean distance of accuracy from confidence over the bins, weighted by their count: the expected calibration error (Naeini et
    al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"), in [0, 1].

    Raises:
        ValueError: there are no bins.
    """
    if not bins:
        raise ValueError("Expected at least one bin, got none.")
    total = sum(entry.count for entry in bins)
    return sum(entry.count * abs(entry.accuracy - entry.confidence) for entry in bins) / total


def draw_calibration(
    confidences: Sequence[float], hits: Sequence[float], path: Path, title: str = "Calibration of answers"
) -> Path:
    """
    Draws a reliability diagram: accuracy over confidence in ten bins of equal count, the number of answers at each, the diagonal on
    which a calibrated model lies, and below how often each confidence occurs.

    Args:
        confidences, hits (`Sequence[float]`):
            As for [`calibration_bins`].
        path (`Path`):
            The PNG file.
        title (`str`, *optional*):
            Heading; the expected calibration error is added to it.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: as for [`calibration_bins`].
    """
    bins = calibration_bins(confidences, hits)
    error = expected_calibration_error(bins)
    figure = new_figure(5.4, 6.4)
    figure.suptitle(f"{title}\nexpected calibration error {100 * error:.1f} % ({len(confidences)} answers)", wrap=True)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    upper.plot([0, 100], [0, 100], color=CHANCE_GREY, linestyle="--", linewidth=1, label="calibrated")
    trust, accuracy = ([100 * getattr(entry, name) for entry in bins] for name in ("confidence", "accuracy"))
    upper.vlines(trust, accuracy, trust, colors=ORANGE, linewidth=3, alpha=0.6, label="gap")
    upper.plot(trust, accuracy, color=BLUE, marker="o", markersize=5, linewidth=1.2, label="model")
    for entry, x, y in zip(bins, trust, accuracy):
        is_below = y < x  # the number stands away from the gap
        upper.annotate(
            f"{entry.count}",
            (x, y),
            (0, -6 if is_below else 6),
            textcoords="offset points",
            ha="center",
            va="top" if is_below else "bottom",
            fontsize=7,
        )
    upper.set_ylabel("accuracy (%); numbers: answers in the bin")
    upper.set_ylim(0, 103)
    upper.legend(fontsize=8)
    right = np.asarray(hits, dtype=float) == 1
    percent = 100 * np.asarray(confidences, dtype=float)
    lower.hist(
        [percent[right], percent[~right]],
        bins=np.linspace(0, 100, 21).tolist(),
        stacked=True,
        color=[BLUE, BLIND_GREY],
        label=["right", "wrong"],
    )
    lower.set_ylim(bottom=0)
    lower.set_ylabel("answers (number)")
    lower.set_xlabel("probability of the answer (%)")
    lower.set_xlim(0, 100)
    lower.legend(fontsize=8)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    return save_png(figure, path)


__all__ = [
    "CalibrationBin",
    "RecallCurve",
    "calibration_bins",
    "draw_calibration",
    "draw_recall_curves",
    "draw_type_bars",
    "expected_calibration_error",
]
