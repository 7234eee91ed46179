"""Loss and metric curves of a training run, as one picture and one table."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .figures import new_figure, save_png
from .files import write_atomically


logger = logging.get_logger(__name__)

# Endings of what Trainer's evaluation logs beside the metrics.
NOT_METRICS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
CHANCE = "chance"
SHARE_WORDS = ("accuracy", "recall", "r@")  # of metrics that are shares of samples, logged from 0 to 1
SMOOTHED_FROM = 60  # training steps in the log, from which on a running mean is drawn too


def save_curves(log_history: Sequence[dict[str, Any]], destination: str | Path, title: str) -> list[Path]:
    """
    Writes `curves.png` and `curves.csv`.

    The picture shows the loss (training and evaluation), the learning rate, the norm of the gradient, and every other
    `eval_*` metric. Accuracies and recalls, which are logged from 0 to 1, are drawn in percent. A metric `eval_X` is drawn
    with a dashed chance line if the log has `eval_X_chance`, or `eval_chance_Y` where X ends with Y; `eval_chance` or
    `chance` is that of all other accuracies.

    Args:
        log_history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`. Where a step is in it twice, as after a resumed run, the later entry counts; of two
            validations the first, since the one after training may be of the best checkpoint's weights.
        destination (`str` or `Path`):
            Folder, made if need be.
        title (`str`):
            Heading of the picture.

    Returns:
        `list[Path]`: the files written, the picture first; none, with a warning, if the log holds no step.
    """
    series = read_series(log_history)
    if not series:
        logger.warning("No curves: nothing was logged. Set `logging_strategy` to steps.")
        return []
    picture, table = (Path(destination) / name for name in ("curves.png", "curves.csv"))
    save_png(draw(series, title), picture)
    write_atomically(to_csv(series).encode(), table)
    return [picture, table]


def read_series(log_history: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """For each logged name its values by step, in the order of the steps."""
    series: dict[str, dict[int, float]] = {}
    for entry in log_history:
        if "step" not in entry or "train_runtime" in entry:  # the latter sums up the run
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                values, step = series.setdefault(name, {}), int(entry["step"])
                if not (name.startswith("eval_") and step in values):
                    values[step] = float(value)
    if set(series) <= {"epoch"}:
        return {}
    return {name: dict(sorted(values.items())) for name, values in series.items()}


def to_csv(series: dict[str, dict[int, float]]) -> str:
    """One row per step; an empty cell where nothing was logged."""
    names = sorted(series, key=lambda name: name != "epoch")  # epoch first, the others as they came
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["step", *names])
    for step in sorted({step for values in series.values() for step in values}):
        writer.writerow([step, *(series[name].get(step, "") for name in names)])
    return file.getvalue()


def arrange_panels(series: dict[str, dict[int, float]]) -> dict[str, list[str]]:
    """Which names are drawn together: losses, shares of one kind, and everything else by itself."""
    panels: dict[str, list[str]] = {"loss": [], "learning rate": [], "gradient norm": []}
    fixed = {"loss": "loss", "learning_rate": "learning rate", "grad_norm": "gradient norm"}
    for name in series:
        is_metric = name.startswith("eval_") and not name.endswith(NOT_METRICS) and not is_chance(name)
        if name in fixed:
            panels[fixed[name]].append(name)
        elif is_metric and name.endswith("_loss"):
            panels["loss"].append(name)
        elif is_metric and is_share(name, series[name]):
            kind = "accuracy" if "accuracy" in name else "recall"
            panels.setdefault(f"{kind} (%)", []).append(name)
        elif is_metric:
            panels.setdefault(readable(name), []).append(name)
    return {heading: names for heading, names in panels.items() if names}


def is_share(name: str, values: dict[int, float]) -> bool:
    within = all(0 <= value <= 1 for value in values.values() if math.isfinite(value))
    return within and any(word in name.lower() for word in SHARE_WORDS)


def readable(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ")


def is_chance(name: str) -> bool:
    return name.endswith(CHANCE) or name.startswith(f"eval_{CHANCE}_")


def find_chance(name: str, series: dict[str, dict[int, float]]) -> float | None:
    """The last logged chance level of a metric, from 0 to 1."""
    prefix = f"eval_{CHANCE}_"
    names = [f"{name}_{CHANCE}"]
    names += sorted(
        (other for other in series if other.startswith(prefix) and name.endswith(other.removeprefix(prefix))),
        key=len,
        reverse=True,  # `deduplicated_recall_at_1` ends with `recall_at_1` too
    )
    if "accuracy" in name:
        names += [f"eval_{CHANCE}", CHANCE]
    for candidate in names:
        if candidate in series:
            return list(series[candidate].values())[-1]
    return None


def draw(series: dict[str, dict[int, float]], title: str) -> Any:
    """The picture, as a `matplotlib.figure.Figure`."""
    panels = arrange_panels(series)
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = new_figure(5.2 * columns, 0.5 + 3.4 * rows)
    figure.suptitle(title, wrap=True)
    for index, (heading, names) in enumerate(panels.items()):
        draw_panel(figure.add_subplot(rows, columns, index + 1), heading, names, series)
    return figure


def draw_panel(axes: Any, heading: str, names: list[str], series: dict[str, dict[int, float]]) -> None:
    is_percent = heading.endswith("(%)")
    scale = 100 if is_percent else 1
    chances: dict[float, Any] = {}
    notes = []
    for name in names:
        steps = list(series[name])
        # Lines have gaps where a value is missing; an infinite one would stretch the axis to nothing.
        values = [value * scale if math.isfinite(value) else math.nan for value in series[name].values()]
        if bad := [step for step, value in zip(steps, values) if math.isnan(value)]:
            notes.append(f"{readable(name)}: NaN or infinite {len(bad)} times, first at step {bad[0]}")
        smooth = name in ("loss", "grad_norm") and len(steps) >= SMOOTHED_FROM
        label = {"loss": "training", "eval_loss": "evaluation"}.get(name, readable(name))
        marker = "o" if name.startswith("eval_") or len(steps) == 1 else ""
        (line,) = axes.plot(
            steps,
            values,
            marker=marker,
            markersize=3.5,
            linewidth=0.8 if smooth else 1.4,
            alpha=0.35 if smooth else 1.0,
            label=None if smooth else label,
            zorder=3 if name.startswith("eval_") else 2,
        )
        if smooth:
            width = max(5, len(steps) // 30)
            axes.plot(steps, running_mean(values, width), color=line.get_color(), linewidth=1.6, label=label)
        chance = find_chance(name, series)
        if chance is not None and math.isfinite(chance):
            chances.setdefault(chance, line.get_color())
    for chance, color in chances.items():
        shared = len(chances) == 1 and len(names) > 1
        axes.axhline(
            chance * scale,
            linestyle="--",
            linewidth=1.0,
            color="0.35" if shared else color,
            label=f"chance {chance * scale:.3g}{' %' if is_percent else ''}",
            zorder=1,
        )
    axes.set_title(heading, fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    if heading == "learning rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if is_percent:
        axes.set_ylim(-3, 103)
    if notes:
        axes.text(
            0.5, 0.98, "\n".join(notes), transform=axes.transAxes, ha="center", va="top", color="tab:red", size=8
        )
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1 or heading == "loss":
        axes.legend(fontsize=8)


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean over up to `width` values, the last of them being the one at that place; those that are NaN do not count."""
    means = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if not math.isnan(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means
