"""Runs the measurements and writes them: JSON for programs, Markdown and pictures for readers."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically, write_json_atomically
from .measure import describe_machine
from .sections import SECTIONS, Row, Settings


TITLES = {
    "machine": "What the machine can do",
    "encoder": "Encoder, one forward pass",
    "training": "Encoder, one training step",
    "preparation": "Preparing a scan",
    "generation": "An answer",
    "questions": "Questions about one volume",
    "profile": "Where the time of the encoder goes, by operation",
}
# Names of columns for readers, and how their values are written. Quartiles stand in the JSON file only.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "matmul_gflops": ("matrix product, GFLOP/s", "{:.0f}".format),
    "convolution_gflops": ("convolution, GFLOP/s", "{:.0f}".format),
    "copy_gb_per_s": ("copy, GB/s", "{:.1f}".format),
    "seconds": ("ms", lambda value: f"{1000 * value:.0f}"),
    "seconds_encoded_each_time": ("ms, encoded each time", lambda value: f"{1000 * value:.0f}"),
    "seconds_encoded_once": ("ms, encoded once", lambda value: f"{1000 * value:.0f}"),
    "volumes_per_s": ("volumes/s", "{:.2f}".format),
    "speedup": ("times as fast", "{:.2f}".format),
    "max_relative_error": ("max relative error", "{:.1e}".format),
    "max_difference": ("max difference", "{:.1e}".format),
    "peak_mb": ("peak MB", "{:.0f}".format),
    "peak_ratio": ("share of the peak", "{:.2f}".format),
    "times_roofline": ("times the roofline", "{:.2f}".format),
    "overhead": ("overhead", "{:+.1%}".format),
    "share": ("share of the time", "{:.1%}".format),
    "file_mb": ("file, MB", "{:.0f}".format),
}


def run_benchmark(
    settings: Settings, sections: Sequence[str], output: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """
    Measures, and writes `benchmark.json`, `benchmark.md` and, where matplotlib is installed, pictures.

    Args:
        settings ([`Settings`]):
            What to measure.
        sections (`Sequence[str]`):
            Names in `SECTIONS`, in the order in which they run.
        output (`Path`):
            Folder, made if need be.
        tell (`Callable[[str], None]`, *optional*):
            Called with the name of each section before it starts.

    Returns:
        `dict`: what `benchmark.json` holds.

    Raises:
        ValueError: there is no section of a name.
    """
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"Expected sections out of {', '.join(SECTIONS)}, got {name!r}.")
    results: dict[str, Any] = {"machine_description": describe_machine(settings.device), "runs": settings.runs}
    for name in sections:
        tell(TITLES[name])
        results[name] = list(SECTIONS[name](settings))
        # After each section, so that an interrupted run leaves what it has measured.
        write_json_atomically(results, output / "benchmark.json")
        write_atomically(to_markdown(results).encode(), output / "benchmark.md")
    for name, picture in draw(results).items():
        write_atomically(picture, output / name)
    return results


def to_markdown(results: dict[str, Any]) -> str:
    """The tables of all sections, under a description of the machine."""
    machine = results["machine_description"]
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = ["# Benchmark", "", f"Measured on: {described}. Medians of {results['runs']} runs in turns.", ""]
    for name, title in TITLES.items():
        if results.get(name):
            lines += [f"## {title}", "", *table(results[name]), ""]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table. Columns in which no row has a value are left out."""
    names = [name for name in rows[0] if name != "seconds_quartiles" and any(row[name] is not None for row in rows)]
    header = [COLUMNS[name][0] if name in COLUMNS else name.replace("_", " ") for name in names]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        lines.append(f"| {' | '.join(write_cell(name, row[name]) for name in names)} |")
    return lines


def write_cell(name: str, value: Any) -> str:
    """One value as readers want it; nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return COLUMNS[name][1](value) if name in COLUMNS else str(value)


def draw(results: dict[str, Any]) -> dict[str, bytes]:
    """Pictures as PNG by file name: times of the encoder in bars. None without matplotlib or without an encoder."""
    rows = results.get("encoder")
    if not rows:
        return {}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        size = "x".join(map(str, row["image_size"]))
        cases.setdefault(f"{row['variant']} {row['batch_size']} x {size}\n{row['dtype']}", {})[row["path"]] = row
    figure = Figure(figsize=(max(6.0, 2.0 * len(cases)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    paths = ("plain", "modules", "fused", "vit3d")
    for place, path in enumerate(paths):
        heights = [1000 * case[path]["seconds"] if path in case else 0.0 for case in cases.values()]
        positions = [index + 0.2 * (place - 1.5) for index in range(len(cases))]
        bars = axes.bar(positions, heights, width=0.2, label=path)
        axes.bar_label(bars, [f"{height:.0f}" if height else "" for height in heights], fontsize=7)
    axes.set_xticks(range(len(cases)), list(cases), fontsize=8)
    axes.set_ylabel("ms of a forward pass, less is better")
    axes.set_title(results["machine_description"]["processor"], fontsize=9)
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return {"encoder.png": stream.getvalue()}


__all__ = ["TITLES", "draw", "run_benchmark", "to_markdown"]
