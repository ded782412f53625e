"""The page and the figure of the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measure import harness
from measure.harness import Results, Row, Rows
from papers.basel.comparison import BASEL, KEPT

TARGETS = ("arithmetic", "code")


def page(results: Results) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    facts, rows = results.facts, results.rows
    texts = list(next(iter(rows.values()))["perplexity"]) if rows else []
    ordered = sorted(rows.values(), key=lambda row: (-row["asked"], row["target"] or "", row["series"]))
    head = ["kept", "method", "target", *texts, "training"]
    lines = [
        "# Basis selection for a target task (2405.15877)",
        "",
        f"Basis selection (Basel) shrinks {facts['model']} for one target task. It trains on text of the task while "
        "it drops directions. This page compares it with two truncations that train nothing.",
        "",
        "- *SVD* truncates every matrix to the same share.",
        "- *SVD-LLM* (2403.07378) does so under the second moment of the target's training text.",
        "- *Kept* is what is stored of all linear layers' parameters, new bases included.",
        "",
        "Perplexity is measured on held-out items of each target, and on Wikipedia prose. It covers the first "
        f"{facts['tokens']:,} tokens of each text, in windows of {facts['context']}. Weights are floats, and matrix "
        f"products run in {facts['products']}. ± is one standard error over windows.",
        "",
        "Made by `python samples/papers/basel/main.py`. All digits, and the losses of each step: "
        "[basel.json](basel.json).",
        "",
        "![perplexity against kept share](basel.svg)",
        "",
        harness.table(head, map(cells, ordered), "r  " + "r" * len(texts)),
        "",
        harness.reading(reading(rows)),
    ]
    return "\n".join(lines) + "\n"


def cells(row: Row) -> list[object]:
    """Return one line of the table."""
    values = [f"{value:.4g} ± {error:.3g}" for value, error in row["perplexity"].values()]
    spent = ""
    if "steps" in row:
        minutes = row["training_seconds"] / 60
        spent = f"{row['steps']} steps, rate {row['learning_rate']:g}, {minutes:.0f} min"
    return [f"{row['kept']:.3f}", row["series"], row["target"] or "", *values, spent]


def reading(rows: Rows) -> Iterator[str]:
    """Yield what the numbers say, for each target and share: the best selection, and what it is compared with."""
    if "dense" not in rows:
        return
    for target in TARGETS:
        for keep in KEPT:
            found = {
                row["series"].removeprefix(BASEL): row["perplexity"]
                for row in rows.values()
                if row["series"].startswith(BASEL) and (row["target"], row["asked"]) == (target, keep)
            }
            if found:
                yield summary(rows, target, keep, found)


def summary(rows: Rows, target: str, keep: float, found: Mapping[str, Any]) -> str:
    """Return what the selections for a target at one share reach, on it and elsewhere."""
    ordered = sorted(found, key=lambda name: float(found[name][target][0]))
    best, dense = found[ordered[0]], rows["dense"]["perplexity"]
    listed = ", ".join(f"{found[name][target][0]:.4g} by {name}" for name in ordered)
    without = [
        f"{rows[name]['perplexity'][target][0]:.4g} by {series}"
        for name, series in (
            (f"svd-{keep}", "SVD"),
            (f"svdllm-{target}-{keep}", "SVD-LLM on the target's text"),
        )
        if name in rows
    ]
    elsewhere = ", ".join(
        f"{name} {dense[name][0]:.4g} to {best[name][0]:.4g}" for name in best if name != target
    )
    truncated = f" Without training: {' and '.join(without)}." if without else ""
    return (
        f"{target} at {keep}: perplexity {listed}.{truncated} The dense model, never trained on the task, has "
        f"{dense[target][0]:.4g}. With the best importance, outside the target: "
        f"{elsewhere}.{verdict(rows, target, keep, best[target])}"
    )


def verdict(rows: Rows, target: str, keep: float, reached: list[float]) -> str:
    """Return whether training and selecting beats whitened truncation at the same size, which trains nothing."""
    row = rows.get(f"svdllm-{target}-{keep}")
    if row is None:
        return ""
    (value, error), (other, other_error) = reached, row["perplexity"][target]
    if abs(value - other) < 2 * math.hypot(error, other_error):
        return " On the target's text, Basel and SVD-LLM do not differ by more than two standard errors."
    return f" On the target's text, Basel is {'better' if value < other else 'worse'} than SVD-LLM."


@harness.styled
def draw(rows: Rows, path: Path) -> None:
    """Draw, for each target, its perplexity against the kept share, a line a method."""
    figure, panels = harness.new_figure(1, len(TARGETS), 4.2)
    for panel, target in zip(panels[0], TARGETS, strict=True):
        for series in dict.fromkeys(row["series"] for row in rows.values()):
            points = sorted(
                (row["kept"], row["perplexity"][target][0])
                for row in rows.values()
                if row["series"] == series and row["target"] in (None, target)
            )
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=series)
        panel.set(xlabel="share of all linear parameters kept", yscale="log")
        panel.set_ylabel(f"perplexity, {target}, held out")
        harness.legend(panel)
    harness.save_figure(figure, path)
