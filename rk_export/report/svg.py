"""matplotlib figures in the report's style: drawn without a display, written to the same bytes every time."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure

WIDTH = 10.0
STYLE = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # where a reader has no such font, another one without serifs
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a target's name is a dollar sign
}
# Dates and versions would make two runs of the same report differ.
METADATA = {"svg": dict.fromkeys(("Creator", "Date", "Format", "Type")), "png": {"Software": None}}

P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that draws: it runs in the report's style, whatever the user's own settings are."""

    @functools.wraps(draw)
    def with_style(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(_settings()):
            return draw(*args, **kwargs)

    return with_style


def _settings(**more: Any) -> dict[str, Any]:
    """Return every setting but the backend, which figures of this module do not use."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return {**defaults, **STYLE, **more}


def new_figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of the page's width and its axes as a rows x columns array; ``height`` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure on white; the suffix of ``path`` (``.svg`` or ``.png``) is the format."""
    with matplotlib.rc_context(_settings(**{"svg.hashsalt": path.stem, "svg.fonttype": "path"})):
        figure.savefig(path, metadata=METADATA[path.suffix[1:]], dpi=110, facecolor="white")


def data_uri(figure: Figure, name: str) -> str:
    """Return the figure as a ``data:`` address of an SVG image, which a page holds without loading anything.

    Args:
        figure: The figure.
        name: Seed of the ids inside the drawing: equal figures of equal names have equal addresses.
    """
    stream = io.BytesIO()
    with matplotlib.rc_context(_settings(**{"svg.hashsalt": name, "svg.fonttype": "none"})):
        figure.savefig(stream, format="svg", metadata=METADATA["svg"], facecolor="none")
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
