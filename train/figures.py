"""Pictures drawn without a display, which leave matplotlib's global state alone."""

import io
from pathlib import Path
from typing import Any

from .files import write_atomically


def new_figure(width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure` of the given size in inches, whose parts make room for each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path, dpi: int = 120) -> Path:
    """Writes a figure as PNG, whole or not at all, and returns `path`."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_atomically(content.getvalue(), path)
    return path


__all__ = ["new_figure", "save_png"]
