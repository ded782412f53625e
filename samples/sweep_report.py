"""Tables and plots of `sweep.py`'s results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Rows = dict[str, dict[str, Any]]
TEXT = "wiki"


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write pareto.md and pareto.svg from the rows measured so far."""
    rows: Rows = results["rows"]
    kept = {name: row for name, row in rows.items() if name.startswith(("kept-", "healed-"))}
    sized = {name: row for name, row in rows.items() if "file_bytes" in row}
    (folder / "pareto.md").write_text(_markdown(rows, kept, sized), encoding="utf-8")
    _plot(rows, kept, sized, folder / "pareto.svg")


def _plot(rows: Rows, kept: Rows, sized: Rows, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    _lines(left, kept, "share of all linear parameters kept, floats", clip=200.0)
    _lines(right, sized, "model.onnx and its data, MB", clip=70.0)
    if "dense" in rows:
        for axes in (left, right):
            axes.axhline(rows["dense"]["perplexity"][TEXT][0], color="grey", linewidth=0.8, label="dense")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _lines(axes: Axes, rows: Rows, label: str, clip: float) -> None:
    """Draw one line a series; values above `clip` are left to the table."""
    for series in dict.fromkeys(row["series"] for row in rows.values()):
        points = sorted(
            (row["x"], *row["perplexity"][TEXT])
            for row in rows.values()
            if row["series"] == series and row["perplexity"][TEXT][0] <= clip
        )
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=error, marker="o", markersize=4, capsize=2, label=series)
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity, Wikipedia")


def _markdown(rows: Rows, kept: Rows, sized: Rows) -> str:
    texts = list(next(iter(rows.values()))["perplexity"]) if rows else []
    head = " | ".join(f"perplexity, {text}" for text in texts)
    rule = " | ".join("---:" for _ in texts)
    lines = [
        "# Quality against size",
        "",
        "SmolLM2-135M-Instruct; first 5,120 tokens of each text, windows of 512; ± is one standard error over",
        "windows. Made by `python samples/sweep.py`; data in `pareto.json`.",
        "",
        "![perplexity against kept share and against file size](pareto.svg)",
        "",
    ]
    if "dense" in rows:
        lines += [f"Dense, PyTorch: {_values(rows['dense'])}", ""]
    if kept:
        lines += ["## Share of all linear parameters kept, floats", ""]
        lines += [f"| kept | method | {head} |", f"| --- | --- | {rule} |"]
        for row in sorted(kept.values(), key=lambda row: (-row["x"], row["perplexity"][TEXT][0])):
            lines.append(f"| {row['x']} | {row['series']} | {_cells(row)} |")
        lines.append("")
    if sized:
        lines += ["## Whole files, through ONNX Runtime on CPU", ""]
        lines += [f"| MB | made by | {head} |", f"| ---: | --- | {rule} |"]
        for name, row in sorted(sized.items(), key=lambda item: item[1]["x"]):
            lines.append(f"| {row['x']:.1f} | {row['series']} ({name}) | {_cells(row)} |")
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    return " | ".join(f"{value:.2f} ± {error:.2f}" for value, error in row["perplexity"].values())


def _values(row: dict[str, Any]) -> str:
    parts = [f"{value:.2f} ± {error:.2f} ({text})" for text, (value, error) in row["perplexity"].items()]
    return ", ".join(parts)
