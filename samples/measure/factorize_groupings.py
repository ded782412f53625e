"""Joint groupings against separate matrices at equal kept ratios (2402.16319), in floats, by perplexity.

For each kept ratio, the same share of the same matrices' parameters is kept, once by joint factors and once by
factors of each matrix alone. Nothing is quantized or exported: the rewritten PyTorch model is evaluated. Ranks
are not rounded to multiples.

    python samples/measure/factorize_groupings.py                    all rows that are not in the results yet
    python samples/measure/factorize_groupings.py --rows 'qk*@0.9'   some of them

Writes docs/results/groupings.json and groupings.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Measure, Results, Row

from rk_export import CalibrationOptions, EvalText, Factorize, Recipe, open_source, rewrite_model

KEPT_RATIOS = (0.95, 0.9, 0.8)
DENSE = "dense"
COLLAPSE = 100  # perplexity beyond this multiple of the dense model's is called a collapse in the text


@dataclass(frozen=True)
class Grouping:
    """One way to factorize.

    Args:
        name: Its name in the results.
        matrices: What it covers; groupings of equal `matrices` are compared.
        groups: Groups of `Factorize`.
        qk: As in `Factorize`.
    """

    name: str
    matrices: str
    groups: tuple[str, ...]
    qk: Literal["whole", "per-head"] = "whole"


GROUPINGS = (
    Grouping("qk-whole", "query, key", ("qk",)),
    Grouping("qk-per-head", "query, key", ("qk",), "per-head"),
    Grouping("q+k-separate", "query, key", ("q", "k")),
    Grouping("gate_up", "gate, up", ("gate_up",)),
    Grouping("gate+up-separate", "gate, up", ("gate", "up")),
    Grouping("qkv", "query, key, value", ("qkv",)),
    Grouping("q+k+v-separate", "query, key, value", ("q", "k", "v")),
)


def wanted(model: Path, text: EvalText) -> Iterator[tuple[str, Measure]]:
    """Yield every row, in the order of the table."""
    yield DENSE, partial(measure_dense, model, text)
    for kept in KEPT_RATIOS:
        for grouping in GROUPINGS:
            yield f"{grouping.name}@{kept}", partial(measure, model, grouping, kept, text)


def measure(model: Path, grouping: Grouping, kept_ratio: float, text: EvalText) -> Row:
    """Factorize and evaluate."""
    factorize = Factorize(grouping.groups, keep=kept_ratio, qk=grouping.qk, rank_multiple=1)
    rewritten = rewrite_model(model, Recipe((factorize,), CalibrationOptions("none")))
    pairs = [finding for finding in rewritten.findings if finding.outcome.value == "applied"]
    return {
        "grouping": grouping.name,
        "matrices": grouping.matrices,
        "asked": kept_ratio,
        "kept": sum(pair.bytes_after for pair in pairs) / sum(pair.bytes_before for pair in pairs),
        "relative_error": relative_error(rewritten.spectra),
        **harness.perplexity(rewritten.model, text, model),
    }


def measure_dense(model: Path, text: EvalText) -> Row:
    """Evaluate the dense model."""
    row = {"grouping": DENSE, "matrices": "", "asked": 1.0, "kept": 1.0, "relative_error": 0.0}
    return row | harness.perplexity(open_source(model).load(), text, model)


def relative_error(spectra: Sequence[Any]) -> float:
    """Return the relative error of all truncations together: what lies beyond each rank, over everything."""
    total = lost = 0.0
    for spectrum in spectra:
        squares = [value * value for value in spectrum.singular_values]
        total += sum(squares)
        lost += sum(squares[spectrum.chosen_rank :])
    return float((lost / total) ** 0.5)


def page(results: Results) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    facts = results.facts
    rows = results.ordered(key for key, _ in wanted(Path(), EvalText(Path())))
    lines = [
        "# Joint groupings against separate matrices",
        "Is it better to factorize matrices jointly, or each by itself? Every row replaces some matrices of "
        f"{facts['model']} by factors that keep the same share of the parameters. Nothing is quantized, and no "
        "calibration data is used.",
        f"Perplexity is measured in PyTorch on the first {facts['tokens']} tokens of {facts['text']}. Windows have "
        f"{facts['context']} tokens, do not overlap, and begin without a beginning-of-sequence token. *Relative "
        "error* is the Frobenius norm of the errors of the covered matrices, over the norm of these matrices.",
        "Made by `python samples/measure/factorize_groupings.py`. All digits: [groupings.json](groupings.json).",
        harness.table(
            [
                "matrices",
                "grouping",
                "kept, asked",
                "kept, really",
                "relative error",
                "perplexity",
                "nll ± s.e.",
            ],
            map(cells, rows.values()),
        ),
        harness.reading(reading(rows)),
    ]
    return "\n\n".join(lines) + "\n"


def cells(row: Row) -> list[object]:
    """Return one line of the table."""
    loss = f"{row['nll']:.3f} ± {row['standard_error']:.3f}"
    numbers = f"{row['kept']:.4f}", f"{row['relative_error']:.4f}", f"{row['perplexity']:.4g}", loss
    return [row["matrices"] or "all", row["grouping"], row["asked"], *numbers]


def reading(rows: dict[str, Row]) -> Iterator[str]:
    """Yield what the numbers say: joint against separate where both are there, and collapses."""
    separate = {
        (row["matrices"], row["asked"]): row for row in rows.values() if row["grouping"].endswith("separate")
    }
    for row in rows.values():
        other = separate.get((row["matrices"], row["asked"]))
        if other is None or row is other:
            continue
        verdict = "better" if row["perplexity"] < other["perplexity"] else "worse"
        smaller = "smaller" if row["relative_error"] < other["relative_error"] else "larger"
        yield (
            f"{row['grouping']} at {row['asked']}: perplexity {row['perplexity']:.4g}, {verdict} than "
            f"{other['perplexity']:.4g} for separate matrices. Its error is {smaller} ({row['relative_error']:.4f} "
            f"against {other['relative_error']:.4f})."
        )
    if DENSE not in rows:
        return
    limit = COLLAPSE * rows[DENSE]["perplexity"]
    if fallen := [key for key, row in rows.items() if row["perplexity"] > limit]:
        yield (
            f"These rows have more than {COLLAPSE} times the dense model's perplexity, so truncation without a metric "
            f"is of no use there: {', '.join(fallen)}."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the rows that are missing."""
    return harness.run(script, harness.parser(__doc__, "model", "text", "rows").parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    text = harness.text_of(args)
    results = Results(args.out, "groupings", harness.protocol(args, text))
    results.measure(wanted(harness.model_of(args), text), args.rows)
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())
