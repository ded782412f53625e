"""matplotlib figures in the report's style: drawn without a display, written to the same bytes every time."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure

WIDTH = 10.0
FONT = "DejaVu Sans"
STYLE = {
    "font.family": [FONT],
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


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an ``<svg>`` element with an accessible name; the page chooses its font.

    Args:
        figure: The figure.
        name: Unique in the page; it prefixes every id of the drawing.
        description: What the drawing shows, for those who cannot see it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_settings(**{"svg.hashsalt": name, "svg.fonttype": "none"})):
        figure.savefig(stream, format="svg", metadata=METADATA["svg"], facecolor="none")
    text = stream.getvalue()
    opening = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', text)
    if opening is None:
        raise RuntimeError("matplotlib wrote an SVG file without a viewBox")
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text[opening.end() :])
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(rf" ?font-family: '{FONT}';?", "", re.sub(r"\s*\n\s*", "\n", body))
    return f'<svg role="img" aria-label="{escape(description)}" {opening.group(1)}>{body}'
