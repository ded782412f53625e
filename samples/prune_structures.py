"""Whole structures against low rank: blocks, FFN neurons and key/value heads that go, by perplexity.

Each row prunes SmolLM2 without data (the model's own text gives the scores and the correction), alone and together
with other methods in one plan, and evaluates the PyTorch model that would be exported.

    python samples/prune_structures.py                   all rows that are not in the results yet
    python samples/prune_structures.py --rows 'ffn*'     some of them

Writes ``pruning.json`` after every row, so that an interrupted run goes on where it stopped, and ``pruning.md`` and
``pruning.svg`` from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn

from rk_export import CompressOptions, EvalText, QuantSpec
from rk_export.cli.main import quiet_libraries
from rk_export.commands.compression_inputs import compression_inputs
from rk_export.evaluation.measure import perplexity_of
from rk_export.folders import library_versions
from rk_export.methods.prune.options import PruneOptions
from rk_export.model.torch_logits import torch_logits
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import Budget
from rk_export.planning.planner import make_plan
from rk_export.rewrite.sizes import kept_parameters
from rk_export.source.stored import StoredModel, open_source

logger = logging.getLogger("pruning")

DENSE = "dense"
FLOATS = CompressOptions(groups=(), quant=None, embedding_quant=None, prepare=())
BY_WEIGHTS = replace(FLOATS, calibration=CalibrationOptions("none"))
INT4 = CompressOptions(embedding_quant=None)


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
    options: CompressOptions


def _pruned(name: str, family: str, base: CompressOptions = FLOATS, **prune: float) -> Case:
    return Case(name, family, replace(base, prune=PruneOptions(**prune)))  # type: ignore[arg-type]


CASES = (
    Case(DENSE, DENSE, FLOATS),
    *(_pruned(f"blocks-{count}", "blocks", blocks=count) for count in (1, 2, 3, 4, 6)),
    *(_pruned(f"ffn-{share}", "FFN width", ffn=share) for share in (0.95, 0.9, 0.8, 0.7)),
    *(
        _pruned(f"ffn-{share}-by-weights", "FFN width, by weights", BY_WEIGHTS, ffn=share)
        for share in (0.9, 0.8)
    ),
    _pruned("heads-2-of-3", "heads", kv_groups=2),
    _pruned("blocks-2+ffn-0.9", "together", blocks=2, ffn=0.9),
    _pruned("blocks-2+heads-2+ffn-0.9", "together", blocks=2, ffn=0.9, kv_groups=2),
    *(
        Case(
            f"low-rank-{share}",
            "low rank, one budget",
            replace(FLOATS, groups=None, budget=Budget("keep", share)),
        )
        for share in (0.9, 0.8)
    ),
    Case("INT4", "INT4", INT4),
    _pruned("INT4+ffn-0.9", "INT4", INT4, ffn=0.9),
    _pruned("INT4+blocks-2", "INT4", INT4, blocks=2),
    Case("INT2", "INT2", replace(INT4, quant=QuantSpec(2, 32))),
)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        name: Of the case.
        family: Of the case.
        kept: Share of the decoder blocks' parameters that is left.
        went: What went, in words.
        perplexity: On the text.
        nll: Mean negative log likelihood, in nats.
        standard_error: Of `nll`, over the windows.
        seconds: Of all of it.
    """

    name: str
    family: str
    kept: float
    went: str
    perplexity: float
    nll: float
    standard_error: float
    seconds: float


def measure(source: StoredModel, case: Case, text: EvalText) -> Row:
    """Prune, rewrite, evaluate."""
    start = time.perf_counter()
    ground = compression_inputs(source, case.options)
    plan = make_plan(ground.source, ground.options, statistics=ground.statistics, table=ground.table)
    rewritten = ground.rewrite(replace(plan, pruning=ground.source.pruning))
    layers = rewritten.model.get_submodule(source.architecture.layers)
    dense = source.skeleton().get_submodule(source.architecture.layers)
    result = perplexity_of(torch_logits(rewritten.model), text, source.folder)
    return Row(
        name=case.name,
        family=case.family,
        kept=kept_parameters(layers) / kept_parameters(_numbered(dense)),
        went=_went(source, ground.source),
        perplexity=result.perplexity,
        nll=result.nll,
        standard_error=result.standard_error,
        seconds=time.perf_counter() - start,
    )


def _numbered(layers: nn.Module) -> nn.Module:
    """Return meta layers with storage of their own, so that no two parameters look tied."""
    return layers.to_empty(device=torch.device("cpu"))


def _went(dense: StoredModel, left: StoredModel) -> str:
    if left.pruning is None:
        return ""
    gone = sorted(set(range(dense.layer_count)) - set(left.pruning.blocks))
    parts = [f"blocks {', '.join(map(str, gone))}"] if gone else []
    if left.pruning.ffn_width is not None:
        parts.append(f"{dense.config.intermediate_size - left.pruning.ffn_width} neurons a block")
    if left.pruning.kv_groups:
        parts.append(f"all but {len(left.pruning.kv_groups[0])} key/value heads")
    return "; ".join(parts)


def load_rows(path: Path) -> dict[str, Row]:
    """Return the rows measured earlier, by name."""
    if not path.is_file():
        return {}
    return {row["name"]: Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def save(folder: Path, name: str, text: EvalText, rows: dict[str, Row]) -> None:
    """Write the result files, rows in the order of the cases."""
    ordered = [rows[case.name] for case in CASES if case.name in rows]
    data = {
        "model": name,
        "text": text.path.name,
        "tokens": text.limit,
        "context": text.context,
        "versions": library_versions(),
        "rows": [asdict(row) for row in ordered],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pruning.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "pruning.md").write_text(page(name, text, ordered), encoding="utf-8")
    draw(ordered, folder / "pruning.svg")


def page(name: str, text: EvalText, rows: list[Row]) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    lines = [
        "# Structured pruning",
        f"{name}. Perplexity in PyTorch on {text.path.name}: first {text.limit} tokens, windows of {text.context} "
        "tokens that do not overlap. Kept: share of the decoder blocks' parameters. Scores and corrections come from "
        "8,192 tokens that the model wrote itself; nothing is trained.",
        "Made by `python samples/prune_structures.py`; numbers with all digits: [pruning.json](pruning.json).",
        "![Perplexity over kept parameters](pruning.svg)",
        table(rows),
        "## Reading",
        "\n".join(f"- {line}" for line in reading(rows)) or "- Too few rows yet.",
    ]
    return "\n\n".join(lines) + "\n"


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ["| case | what went | kept | perplexity | nll ± s.e. |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(
        head
        + [
            f"| {row.name} | {row.went} | {row.kept:.4f} | {row.perplexity:.4g} "
            f"| {row.nll:.3f} ± {row.standard_error:.3f} |"
            for row in rows
        ]
    )


def reading(rows: list[Row]) -> Iterator[str]:
    """Yield what the numbers say."""
    by_name = {row.name: row for row in rows}
    for share in ("0.9", "0.8"):
        pair = [by_name.get(f"ffn-{share}"), by_name.get(f"ffn-{share}-by-weights")]
        if pair[0] and pair[1]:
            yield (
                f"Neurons chosen and corrected by the model's own text: {pair[0].perplexity:.4g} at {share} of the "
                f"width, {pair[1].perplexity:.4g} by the norms of the weights alone."
            )
    low = [row for row in rows if row.name.startswith("low-rank")]
    for row in rows:
        if row.family not in ("blocks", "FFN width", "heads", "together") or not low:
            continue
        near = min(low, key=lambda other: abs(other.kept - row.kept))
        if abs(near.kept - row.kept) < 0.02:
            verdict = "better" if row.perplexity < near.perplexity else "worse"
            yield (
                f"{row.name} keeps {row.kept:.3f} at perplexity {row.perplexity:.4g}: {verdict} than low rank "
                f"({near.kept:.3f}: {near.perplexity:.4g})."
            )


def draw(rows: list[Row], path: Path) -> None:
    """Draw perplexity over kept parameters, a line for each family in floats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for family in dict.fromkeys(row.family for row in rows if not row.family.startswith(("INT", DENSE))):
        points = sorted((row.kept, row.perplexity) for row in rows if row.family == family)
        panel.plot(*zip(*points, strict=True), marker="o", label=family)
    panel.set(xlabel="kept share of the blocks' parameters", ylabel="perplexity", yscale="log")
    panel.invert_xaxis()
    if dense := next((row for row in rows if row.name == DENSE), None):
        panel.axhline(dense.perplexity, color="black", linewidth=0.8, label=DENSE)
    panel.legend()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="HF folder, hub id or .gguf file (default SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="text for perplexity (default Wikipedia prose)")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'ffn*' or 'blocks-?'"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    quiet_libraries()

    from rk_export.evaluation.assets import smollm2, wiki_text

    source = open_source(args.model or smollm2())
    name = Path(args.model or "SmolLM2-135M-Instruct").name
    text = EvalText(args.text or wiki_text("eval"), args.context, args.tokens)
    rows = load_rows(args.out / "pruning.json")
    for case in CASES:
        if case.name in rows or not any(fnmatch(case.name, pattern) for pattern in args.rows):
            continue
        rows[case.name] = row = measure(source, case, text)
        logger.info(
            "%-28s kept %.3f, perplexity %.4g, %.0f s", row.name, row.kept, row.perplexity, row.seconds
        )
        save(args.out, name, text, rows)
    save(args.out, name, text, rows)


if __name__ == "__main__":
    main()
