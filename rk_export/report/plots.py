"""The report's plots: spectra, and ranks, bytes and errors over the layers.

Figures are returned unrendered; ``rk_export.report.svg`` writes them.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from rk_export.report.humanize import plain
from rk_export.report.matrix_groups import MatrixGroup, by_role, split_target
from rk_export.report.records import LayerError, Spectrum
from rk_export.report.svg import new_figure, save_figure, styled

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5b5b5b", "#882255")
MARK = "#d55e00"
MAX_POINTS = 120


def _colors(roles: Iterable[str]) -> dict[str, str]:
    return {role: COLORS[i % len(COLORS)] for i, role in enumerate(roles)}


@styled
def spectra_figure(spectra: Sequence[Spectrum], columns: int = 4) -> Figure:
    """Draw small multiples of normalized singular values on a log axis, the chosen rank marked.

    Args:
        spectra: One panel each, filled row by row; at least one.
        columns: Panels in a row.
    """
    columns = min(columns, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, axes = new_figure(rows, columns, 0.4 + 2.0 * rows, sharey=True)
    for panel, spectrum in zip(axes.flat, spectra, strict=False):
        _draw_spectrum(panel, spectrum)
    for unused in axes.flat[len(spectra) :]:
        unused.set_visible(False)
    figure.supylabel("singular value / largest", fontsize=9)
    figure.supxlabel("index", fontsize=9)
    return figure


def _draw_spectrum(panel: Any, spectrum: Spectrum) -> None:
    values = np.asarray(spectrum.singular_values, dtype=np.float64)
    positive = values[np.isfinite(values) & (values > 0)]
    full = f"full rank {spectrum.full_rank}"
    chosen = full if spectrum.chosen_rank is None else f"rank {spectrum.chosen_rank} of {spectrum.full_rank}"
    panel.set_title(f"{plain(spectrum.target)}\n{chosen}", fontsize=8)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    if positive.size:
        indices = _thin(positive.size)
        panel.plot(indices + 1, positive[indices] / positive[0], color=COLORS[0], linewidth=1.4)
    if spectrum.chosen_rank is not None:
        panel.axvline(spectrum.chosen_rank, color=MARK, linewidth=1.2)
    panel.set_xlim(0, spectrum.full_rank * 1.02)


def _thin(length: int) -> Any:
    """Return at most MAX_POINTS indices below ``length``, denser at both ends where spectra bend."""
    half = MAX_POINTS // 2
    if length <= MAX_POINTS:
        return np.arange(length)
    head = np.geomspace(1, length, half).astype(int) - 1
    return np.unique(np.concatenate([head, np.linspace(0, length - 1, half).astype(int)]))


def select_spectra(spectra: Sequence[Spectrum], layers: int = 4) -> list[Spectrum]:
    """Return the spectra of ``layers`` layers spread evenly from first to last, role by role."""
    roles: dict[str, list[Spectrum]] = defaultdict(list)
    for spectrum in spectra:
        roles[split_target(spectrum.target)[1]].append(spectrum)
    return [
        group[i]
        for group in roles.values()
        for i in sorted({round(i) for i in np.linspace(0, len(group) - 1, layers)})
    ]


def rank_figure(groups: Iterable[MatrixGroup]) -> Figure | None:
    """Draw the chosen rank over the layers, one line a role; None where nothing was factorized."""
    lines = {
        role: _per_layer((group.layer, group.rank) for group in members)
        for role, members in by_role(groups).items()
    }
    return _line_figure(lines, "rank")


def matrix_error_figure(groups: Iterable[MatrixGroup]) -> Figure | None:
    """Draw each group's largest relative weight error over the layers; None where no error is defined."""
    lines = {
        role: _per_layer((group.layer, max(group.errors, default=None)) for group in members)
        for role, members in by_role(groups).items()
    }
    return _line_figure(lines, "relative weight error")


def layer_error_figure(errors: Sequence[LayerError]) -> Figure | None:
    """Draw the relative error of each layer's output, factorized and quantized; None where not measured."""
    lines = {
        "factorized": {error.layer: error.factorized for error in errors},
        "factorized and quantized": {error.layer: error.quantized for error in errors},
    }
    return _line_figure(lines, "relative output error") if errors else None


def _per_layer(values: Iterable[tuple[int | None, float | None]]) -> dict[int, float]:
    """Return the mean value at each layer (experts of one layer share a point)."""
    at: dict[int, list[float]] = defaultdict(list)
    for layer, value in values:
        if layer is not None and value is not None and np.isfinite(value):
            at[layer].append(value)
    return {layer: sum(found) / len(found) for layer, found in sorted(at.items())}


@styled
def _line_figure(lines: Mapping[str, Mapping[int, float]], label: str) -> Figure | None:
    """Draw values over the layers; a line without values keeps its color free, so that roles look alike."""
    if not any(lines.values()):
        return None
    figure, axes = new_figure(1, 1, 3.0)
    panel = axes[0, 0]
    colors = _colors(lines)
    for name, line in lines.items():
        if not line:
            continue
        panel.plot(
            list(line), list(line.values()), "o-", color=colors[name], label=plain(name), ms=3.5, lw=1.3
        )
    panel.set(xlabel="layer", ylabel=label)
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="x", integer=True)
    _legend(figure, panel)
    return figure


def _legend(figure: Figure, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 5), frameon=False)


@styled
def layer_bytes_figure(groups: Sequence[MatrixGroup]) -> Figure | None:
    """Draw stored bytes per layer, stacked by role, pale before and full after; None where unknown."""
    inside = [group for group in groups if group.layer is not None and group.bytes_before]
    if not inside:
        return None
    figure, axes = new_figure(1, 1, 3.2)
    layers = sorted({group.layer for group in inside if group.layer is not None})
    floors = np.zeros((2, len(layers)))
    roles = by_role(inside)
    colors = _colors(by_role(groups))
    for role, members in roles.items():
        for side, (offset, alpha) in enumerate(((-0.21, 0.35), (0.21, 1.0))):
            heights = _heights(members, layers, side)
            label = plain(role) if side else None
            look = {"color": colors[role], "alpha": alpha, "label": label}
            axes[0, 0].bar(np.array(layers) + offset, heights, 0.4, floors[side], **look)
            floors[side] += heights
    axes[0, 0].set(xlabel="layer (left, pale: before; right: after)", ylabel="MB")
    axes[0, 0].locator_params(axis="x", integer=True)
    _legend(figure, axes[0, 0])
    return figure


def _heights(members: Sequence[MatrixGroup], layers: Sequence[int], side: int) -> Any:
    """Return megabytes per layer, before (side 0) or after (side 1)."""
    total = dict.fromkeys(layers, 0.0)
    for group in members:
        if group.layer is not None:
            total[group.layer] += (group.bytes_after if side else group.bytes_before) / 1e6
    return np.array([total[layer] for layer in layers])


@styled
def role_bytes_figure(groups: Sequence[MatrixGroup]) -> Figure | None:
    """Draw the bytes of each role over the whole model, before and after; None where unknown."""
    roles = by_role(group for group in groups if group.bytes_before)
    if not roles:
        return None
    figure, axes = new_figure(1, 1, 0.9 + 0.42 * len(roles))
    places = np.arange(len(roles))
    before = [sum(group.bytes_before for group in members) / 1e6 for members in roles.values()]
    after = [sum(group.bytes_after for group in members) / 1e6 for members in roles.values()]
    palette = _colors(by_role(groups))
    colors = [palette[role] for role in roles]
    axes[0, 0].barh(places - 0.2, before, 0.38, color=colors, alpha=0.35)
    axes[0, 0].barh(places + 0.2, after, 0.38, color=colors)
    axes[0, 0].set_yticks(places, list(map(plain, roles)))
    axes[0, 0].invert_yaxis()
    axes[0, 0].grid(axis="y", visible=False)
    axes[0, 0].set(xlabel="MB (upper, pale: before; lower: after)")
    return figure


@styled
def quality_figure(points: Sequence[tuple[str, float, float, float | None]], measure: str) -> Figure | None:
    """Draw a quality against bytes, one named point a model, its standard error as a bar; None below two points.

    Args:
        points: Name, bytes, value and standard error of each model.
        measure: What the value is.
    """
    if len(points) < 2:
        return None
    figure, axes = new_figure(1, 1, 3.6)
    panel = axes[0, 0]
    for color, (name, weight, value, error) in zip(itertools.cycle(COLORS), points, strict=False):
        bar = None if error is None or not np.isfinite(error) else [error]
        panel.errorbar([weight / 1e6], [value], yerr=bar, fmt="o", color=color, capsize=3, label=plain(name))
    panel.set(xlabel="MB of files", ylabel=plain(measure))
    panel.margins(0.12)
    _legend(figure, panel)
    return figure


def model_lines_figure(lines: Mapping[str, Mapping[int, float]], label: str) -> Figure | None:
    """Draw one line a model over the layers; None where no model has values."""
    return _line_figure(lines, label)


def save_spectra_plots(spectra: Sequence[Spectrum], directory: str | Path) -> list[Path]:
    """Write one figure a role, all of its layers in it, as SVG and PNG.

    Args:
        spectra: The spectra of any number of layers and roles.
        directory: Where to write; made when it is missing.

    Returns:
        The files written, e.g. ``spectra-self_attn.qk.svg`` and ``.png``.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    roles: dict[str, list[Spectrum]] = defaultdict(list)
    for spectrum in spectra:
        roles[re.sub(r"[^\w.-]", "_", split_target(spectrum.target)[1])].append(spectrum)
    paths = []
    for role, members in roles.items():
        figure = spectra_figure(members, columns=6)
        for suffix in ("svg", "png"):
            path = folder / f"spectra-{role}.{suffix}"
            save_figure(figure, path)
            paths.append(path)
    return paths
