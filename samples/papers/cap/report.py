"""The page and the figures of the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import harness
from measure.harness import Results, Row, Rows
from papers.cap.workshop import (
    AUCTION,
    DENSE,
    KEPT,
    MIXTURE,
    POLICY,
    SEARCHES,
    SINGLE,
    SSLC,
    TITLES,
    WHOLE,
    wanted,
)

DRAWN = (POLICY, AUCTION, MIXTURE, SSLC)  # in the picture of the allocation
HEAD = ("asked", "method", "kept", "of it low rank", "bytes", "perplexity", "nll ± s.e.", "above dense")


def write(results: Results) -> None:
    """Write page and figures from the rows measured so far."""
    results.write_page(page(results))
    draw_perplexities(in_order(results), results.folder / "cap.svg")
    draw_allocation(in_order(results), results.folder / "cap_allocation.svg")


def in_order(results: Results) -> Rows:
    """Return the rows in the order of the table."""
    return results.ordered(key for key, _, _ in wanted())


def page(results: Results) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    facts, options, rows = results.facts, results.facts["cap"], in_order(results)
    lines = [
        "# Global rank and sparsity: CAP and what it is compared with",
        "CAP keeps of every matrix some directions (low rank) and some single entries (sparse), chosen by one global "
        "budget. This page compares it with other ways to spend the same budget on all matrices in the layers of "
        f"{facts['model']}.",
        "\n".join(
            [
                "- *Asked* and *kept* are shares of the dense parameters. A direction of an (out, in) matrix counts as "
                "out + in parameters, a sparse entry as one.",
                "- *Bytes* is the share of the dense matrices' bytes in half precision. Factors and entries are "
                "stored in half precision, and each entry has a gap byte for its place. Columns are stored dense "
                "where that is smaller.",
                "- *Above dense* counts the matrices that got more parameters than the dense ones have.",
                "- *RPCA* is the robust principal component analysis that splits a matrix into low rank and sparse.",
            ]
        ),
        f"Perplexity is measured in PyTorch, in float32, on the first {facts['tokens']} tokens of {facts['text']}. "
        f"Windows have {facts['context']} tokens, do not overlap, and begin without a beginning-of-sequence token. "
        f"All methods that calibrate use {facts['calibration']}.",
        f"RPCA takes {options['iterations']} steps. The policy takes {options['steps']} steps of "
        f"{options['batch_tokens']} tokens, with learning rate {options['learning_rate']}, window {options['window']} "
        f"and seed {options['seed']}.",
        "Made by `python samples/papers/cap/main.py`. All digits, every matrix' shares and the policy's losses: "
        "[cap.json](cap.json).",
        harness.table(HEAD, map(cells, rows.values()), "r rrrr r"),
        "![perplexity by method, and the policy's losses](cap.svg)",
        "![rank share and sparse density of every matrix](cap_allocation.svg)",
        harness.reading(reading(rows)),
    ]
    return "\n\n".join(lines) + "\n"


def cells(row: Row) -> list[object]:
    """Return one line of the table."""
    low_rank = f"{row['low_rank'] / row['kept']:.1%}" if "low_rank" in row else ""
    shares = f"{row['kept']:.3f}", low_rank, f"{row['bytes']:.3f}"
    quality = f"{row['perplexity']:.4g}", f"{row['nll']:.3f} ± {row['standard_error']:.3f}"
    return [f"{row['asked']:g}", TITLES[row["method"]], *shares, *quality, row.get("over_dense", "")]


def reading(rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield what the numbers say."""
    if WHOLE in rows and DENSE in rows:
        whole = rows[WHOLE]
        yield (
            f"The split itself, with nothing left out, holds {whole['kept']:.2f} times the dense parameters "
            f"({whole['low_rank']:.2f} in directions). It gives perplexity {whole['perplexity']:.4g} against "
            f"{rows[DENSE]['perplexity']:.4g}. The candidates are redundant, so every budget has to break up what the "
            "split put together."
        )
    for keep in KEPT:
        here = {row["method"]: row for row in rows.values() if row["asked"] == keep}
        if len(here) > 1:
            yield from _ranking(keep, here)
        for search, start in SEARCHES.items():
            if search in here and start in here:
                yield from _search(here[search], here[start])
        yield from _against_paper(keep, here)
        yield from _above_dense(keep, here)


def _ranking(keep: float, here: Mapping[str, Row]) -> Iterator[str]:
    order = sorted(here.values(), key=lambda row: float(row["perplexity"]))
    names = "".join(f"\n  - {row['perplexity']:.4g}: {TITLES[row['method']]}" for row in order)
    yield f"At {keep:g}, from best to worst:{names}"


def _search(policy: Row, start: Row) -> Iterator[str]:
    losses = policy["losses"]
    tenth = max(1, len(losses) // 10)
    first, last = losses[:tenth], losses[-tenth:]
    before, after = sum(first) / tenth, sum(last) / tenth
    squares = sum((x - before) ** 2 for x in first) + sum((x - after) ** 2 for x in last)
    error = math.sqrt(squares / max(1, 2 * tenth - 2) * 2 / tenth)
    moved = policy["nll"] - start["nll"]
    yield (
        f"{TITLES[policy['method']]}, at {policy['asked']:g}. The loss of sampled masks is measured against the "
        f"start's top-K on the same tokens. It goes from {before:+.3f} nats (first {tenth} steps) to {after:+.3f} "
        f"(last {tenth}): {after - before:+.3f} ± {error:.3f}. The top-K after the search is "
        f"{'better' if moved < 0 else 'worse'} than the top-K of its start by {abs(moved):.4f} nats (perplexity "
        f"{policy['perplexity']:.4g} against {start['perplexity']:.4g})."
    )


def _against_paper(keep: float, here: Mapping[str, Row]) -> Iterator[str]:
    if keep == 0.5 and POLICY in here and "wanda" in here:
        ours, wanda_row = here[POLICY]["perplexity"], here["wanda"]["perplexity"]
        verdict = "The same holds here" if ours < wanda_row else "This does not hold here"
        yield (
            f"The paper has CAP ahead of Wanda at one half (LLaMA-3-8B: 10.35 against 12.36). {verdict}: {ours:.4g} "
            f"against {wanda_row:.4g}."
        )


def _above_dense(keep: float, here: Mapping[str, Row]) -> Iterator[str]:
    found = {name: row["over_dense"] for name, row in here.items() if row.get("over_dense")}
    if found:
        counted = "".join(f"\n  - {count}: {TITLES[name]}" for name, count in found.items())
        yield f"Matrices that a global choice at {keep:g} gave more parameters than the dense ones have:{counted}"


@harness.styled
def draw_perplexities(rows: Rows, path: Path) -> None:
    """Draw perplexity by method, and the losses on the policy's way."""
    figure, panels = harness.new_figure(1, 2, 4.4, gridspec_kw={"width_ratios": (3, 2)})
    bars, curves = panels[0]
    methods = [name for name in TITLES if any(row["method"] == name for row in rows.values())]
    for keep, marker in zip(KEPT, "os", strict=True):
        here = [row for row in rows.values() if row["asked"] == keep]
        heights = [methods.index(row["method"]) for row in here]
        if here:
            bars.plot([row["perplexity"] for row in here], heights, marker, label=f"kept {keep:g}")
    if DENSE in rows:
        bars.axvline(rows[DENSE]["perplexity"], color="grey", linewidth=0.8, label="dense")
    _label_methods(bars, methods, max((row["perplexity"] for row in rows.values()), default=40.0))
    for row in rows.values():
        if losses := row.get("losses", []):
            label = f"{row['method']}, kept {row['asked']:g}"
            curves.plot(range(1, len(losses) + 1), losses, linewidth=1, label=label)
    curves.set_xlabel("step of the policy")
    curves.set_ylabel("loss of sampled masks beyond the start's top-K, nats")
    for panel in (bars, curves):
        harness.legend(panel, fontsize=8)
    harness.save_figure(figure, path)


def _label_methods(panel: Any, methods: Sequence[str], highest: float) -> None:
    panel.set_xscale("log")
    panel.set_xticks([tick for tick in (20 * 2**step for step in range(16)) if tick < 2 * highest])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_yticks(range(len(methods)), [TITLES[name] for name in methods])
    panel.invert_yaxis()
    panel.set_xlabel("perplexity")


@harness.styled
def draw_allocation(rows: Rows, path: Path) -> None:
    """Draw the share of low rank and of sparse entries in every matrix over the layers."""
    drawn = [rows[f"{method}@{keep}"] for keep in KEPT for method in DRAWN if f"{method}@{keep}" in rows]
    figure, panels = harness.new_figure(2, max(1, len(drawn)), 5.2, sharex=True, sharey="row")
    for column, row in enumerate(drawn):
        for part, label in enumerate(("rank · (out + in) / (out · in)", "sparse entries / (out · in)")):
            panel = panels[part][column]
            for role in SINGLE:
                shares = [item[part] for item in row["allocation"].get(role, [])]
                panel.plot(range(len(shares)), shares, linewidth=1.2, label=role)
            if column == 0:
                panel.set_ylabel(label)
        panels[0][column].set_title(f"{row['method']}, {row['asked']:g}", fontsize=9)
        panels[1][column].set_xlabel("layer")
    harness.legend(panels[0][0], ncols=2)
    harness.save_figure(figure, path)
