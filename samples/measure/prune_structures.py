"""Whole structures against low rank: blocks, FFN neurons and key/value heads that go, by perplexity.

Each row prunes SmolLM2 without data (the model's own text gives the scores and the correction), alone and together
with other methods in one plan, and evaluates the PyTorch model that would be exported.

    python samples/measure/prune_structures.py                   all rows that are not in the results yet
    python samples/measure/prune_structures.py --rows 'ffn*'     some of them

Writes docs/results/pruning.json, pruning.md and pruning.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Results, Row, Rows

from rk_export import (
    Budget,
    CalibrationOptions,
    EvalText,
    Prepare,
    PruneOptions,
    Quantize,
    Recipe,
    Rewritten,
    StoredModel,
    kept_parameters,
    open_source,
    rewrite_model,
)

DENSE = "dense"
FLOATS = Recipe()
BY_WEIGHTS = Recipe(calibration=CalibrationOptions("none"))
INT4 = Recipe((Prepare(), Quantize(bits=4)))


@dataclass(frozen=True)
class Case:
    """One way to make the model smaller.

    Args:
        name: Its name in the results.
        family: What it is drawn as.
        options: All of it.
    """

    name: str
    family: str
    options: Recipe


def _pruned(name: str, family: str, base: Recipe = FLOATS, **prune: float) -> Case:
    return Case(name, family, base.with_step(PruneOptions(**prune)))  # type: ignore[arg-type]


CASES = (
    Case(DENSE, DENSE, FLOATS),
    *(_pruned(f"blocks-{count}", "blocks", blocks=count) for count in (1, 2, 3, 4, 6)),
    *(_pruned(f"ffn-{share}", "FFN width", ffn_keep=share) for share in (0.95, 0.9, 0.8, 0.7)),
    *(
        _pruned(f"ffn-{share}-by-weights", "FFN width, by weights", BY_WEIGHTS, ffn_keep=share)
        for share in (0.9, 0.8)
    ),
    _pruned("heads-2-of-3", "heads", kv_heads_keep=2),
    _pruned("blocks-2+ffn-0.9", "together", blocks=2, ffn_keep=0.9),
    _pruned("blocks-2+heads-2+ffn-0.9", "together", blocks=2, ffn_keep=0.9, kv_heads_keep=2),
    *(
        Case(
            f"low-rank-{share}",
            "low rank, one budget",
            Recipe.load("floats").with_budget(Budget("keep", share)),
        )
        for share in (0.9, 0.8)
    ),
    Case("INT4", "INT4", INT4),
    _pruned("INT4+ffn-0.9", "INT4", INT4, ffn_keep=0.9),
    _pruned("INT4+blocks-2", "INT4", INT4, blocks=2),
    Case("INT2", "INT2", INT4.with_step(Quantize(bits=2))),
)


def measure(model: Path, case: Case, text: EvalText) -> Row:
    """Prune, rewrite, evaluate."""
    dense, rewritten = open_source(model), rewrite_model(model, case.options)
    return {
        "family": case.family,
        "kept": kept_share(dense, rewritten),
        "went": went(dense, rewritten),
        **harness.perplexity(rewritten.model, text, model),
    }


def kept_share(dense: StoredModel, rewritten: Rewritten) -> float:
    """Return the share of the decoder blocks' parameters that is left."""
    blocks = dense.skeleton().get_submodule(dense.architecture.layers)
    whole = sum(parameter.numel() for parameter in blocks.parameters())
    return kept_parameters(rewritten.model.get_submodule(dense.architecture.layers)) / whole


def went(dense: StoredModel, rewritten: Rewritten) -> str:
    """Return what went, in words."""
    left = rewritten.plan.pruning
    if left is None:
        return ""
    gone = sorted(set(range(dense.layer_count)) - set(left.blocks))
    parts = [f"blocks {', '.join(map(str, gone))}"] if gone else []
    if left.ffn_width is not None:
        parts.append(f"{dense.config.intermediate_size - left.ffn_width} neurons a block")
    if left.kv_groups:
        parts.append(f"all but {len(left.kv_groups[0])} key/value heads")
    return "; ".join(parts)


def page(results: Results) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    facts, rows = results.facts, results.ordered(case.name for case in CASES)
    lines = [
        "# Structured pruning",
        f"This page shows what {facts['model']} loses when whole decoder blocks, FFN neurons or attention heads are "
        "removed. *Kept* is the share of the decoder blocks' parameters.",
        f"Perplexity is measured in PyTorch on the first {facts['tokens']} tokens of {facts['text']}, in windows of "
        f"{facts['context']} tokens that do not overlap. Scores and corrections come from 8,192 tokens that the model "
        "wrote itself. Nothing is trained.",
        "Made by `python samples/measure/prune_structures.py`. All digits: [pruning.json](pruning.json).",
        "![Perplexity over kept parameters](pruning.svg)",
        harness.table(
            ["case", "what went", "kept", "perplexity", "nll ± s.e."],
            [
                (
                    *(name, row["went"], f"{row['kept']:.4f}", f"{row['perplexity']:.4g}"),
                    f"{row['nll']:.3f} ± {row['standard_error']:.3f}",
                )
                for name, row in rows.items()
            ],
        ),
        harness.reading(reading(rows)),
    ]
    return "\n\n".join(lines) + "\n"


def reading(rows: Rows) -> Iterator[str]:
    """Yield what the numbers say."""
    for share in ("0.9", "0.8"):
        pair = [rows.get(f"ffn-{share}"), rows.get(f"ffn-{share}-by-weights")]
        if pair[0] and pair[1]:
            yield (
                f"At {share} of the width, neurons that are chosen and corrected with the model's own text give "
                f"perplexity {pair[0]['perplexity']:.4g}. Neurons that are chosen by the norms of the weights alone "
                f"give {pair[1]['perplexity']:.4g}."
            )
    low = [row for name, row in rows.items() if name.startswith("low-rank")]
    for name, row in rows.items():
        if row["family"] not in ("blocks", "FFN width", "heads", "together") or not low:
            continue
        near = min(low, key=lambda other: abs(other["kept"] - row["kept"]))
        if abs(near["kept"] - row["kept"]) < 0.02:
            verdict = "better" if row["perplexity"] < near["perplexity"] else "worse"
            yield (
                f"{name} keeps {row['kept']:.3f} at perplexity {row['perplexity']:.4g}. This is {verdict} than low "
                f"rank ({near['kept']:.3f} at {near['perplexity']:.4g})."
            )


@harness.styled
def draw(rows: Rows, path: Path) -> None:
    """Draw perplexity over kept parameters, a line for each family in floats."""
    figure, panels = harness.new_figure(1, 1, 4.5)
    panel = panels[0, 0]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        points = sorted((row["kept"], row["perplexity"]) for row in rows.values() if row["family"] == family)
        if not family.startswith(("INT", DENSE)):
            panel.plot(*zip(*points, strict=True), marker="o", label=family)
    panel.set(xlabel="kept share of the blocks' parameters", ylabel="perplexity", yscale="log")
    panel.invert_xaxis()
    if DENSE in rows:
        panel.axhline(rows[DENSE]["perplexity"], color="black", linewidth=0.8, label=DENSE)
    harness.legend(panel)
    harness.save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the rows that are missing."""
    return harness.run(script, harness.parser(__doc__, "model", "text", "rows").parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    model, text = harness.model_of(args), harness.text_of(args)
    results = Results(args.out, "pruning", harness.protocol(args, text))
    results.measure([(case.name, partial(measure, model, case, text)) for case in CASES], args.rows)
    results.write_page(page(results))
    draw(results.ordered(case.name for case in CASES), args.out / "pruning.svg")


if __name__ == "__main__":
    sys.exit(main())
