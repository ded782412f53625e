"""Joint groupings against separate matrices at equal kept ratios (2402.16319), in floats, by perplexity.

For each kept ratio, the same share of the same matrices' parameters is kept, once by joint factors and once by
factors of each matrix alone. Nothing is quantized or exported: the rewritten PyTorch model is evaluated. Ranks
are not rounded to multiples.

    python samples/factorize_groupings.py                    all rows that are not in the results yet
    python samples/factorize_groupings.py --rows 'qk*@0.9'   some of them

Writes ``groupings.json`` after every row, so that an interrupted run goes on where it stopped, and
``groupings.md`` from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from rk_export import CompressOptions, EvalText, RankRule
from rk_export.cli.main import quiet_libraries
from rk_export.evaluation.measure import perplexity_of
from rk_export.evaluation.perplexity import PerplexityResult
from rk_export.folders import library_versions
from rk_export.model.torch_logits import torch_logits
from rk_export.planning.planner import make_plan
from rk_export.report.records import Outcome, Spectrum
from rk_export.rewrite.apply import rewrite
from rk_export.source.stored import StoredModel, open_source

logger = logging.getLogger("groupings")

KEPT_RATIOS = (0.95, 0.9, 0.8)
DENSE = "dense"
# Perplexity beyond this multiple of the dense model's is called a collapse in the text.
COLLAPSE = 100


@dataclass(frozen=True)
class Grouping:
    """One way to factorize.

    Args:
        name: Its name in the results.
        matrices: What it covers; groupings of equal `matrices` are compared.
        groups: Groups of `CompressOptions`.
        qk: As in `CompressOptions`.
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


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        grouping: Name of the grouping, or ``dense``.
        matrices: What it covers.
        asked: The kept ratio asked for.
        kept: Share of the covered matrices' parameters that the factors have, ranks being whole numbers.
        relative_error: Frobenius norm of all covered matrices' errors over that of the matrices.
        perplexity: On the text.
        nll: Mean negative log likelihood, in nats.
        standard_error: Of `nll`, over the windows.
        seconds: Of factorization and evaluation together.
    """

    grouping: str
    matrices: str
    asked: float
    kept: float
    relative_error: float
    perplexity: float
    nll: float
    standard_error: float
    seconds: float

    @property
    def key(self) -> str:
        """What ``--rows`` selects by."""
        return DENSE if self.grouping == DENSE else f"{self.grouping}@{self.asked}"


def measure(source: StoredModel, grouping: Grouping, kept_ratio: float, text: EvalText) -> Row:
    """Factorize, evaluate, and return the row."""
    start = time.perf_counter()
    options = CompressOptions(
        groups=grouping.groups,
        qk=grouping.qk,
        rank=RankRule("keep", kept_ratio),
        rank_multiple=1,
        quant=None,
        embedding_quant=None,
    )
    rewritten = rewrite(source, make_plan(source, options))
    applied = [finding for finding in rewritten.findings if finding.outcome is Outcome.APPLIED]
    return _row(
        grouping,
        kept_ratio,
        kept=sum(f.bytes_after for f in applied) / sum(f.bytes_before for f in applied),
        relative_error=relative_error(rewritten.spectra),
        result=perplexity_of(torch_logits(rewritten.model), text, source.folder),
        start=start,
    )


def measure_dense(source: StoredModel, text: EvalText) -> Row:
    """Evaluate the dense model."""
    start = time.perf_counter()
    result = perplexity_of(torch_logits(source.load()), text, source.folder)
    return _row(Grouping(DENSE, "", ()), 1.0, kept=1.0, relative_error=0.0, result=result, start=start)


def _row(
    grouping: Grouping,
    asked: float,
    *,
    kept: float,
    relative_error: float,
    result: PerplexityResult,
    start: float,
) -> Row:
    return Row(
        grouping=grouping.name,
        matrices=grouping.matrices,
        asked=asked,
        kept=kept,
        relative_error=relative_error,
        perplexity=result.perplexity,
        nll=result.nll,
        standard_error=result.standard_error,
        seconds=time.perf_counter() - start,
    )


def relative_error(spectra: tuple[Spectrum, ...]) -> float:
    """Return the relative error of all truncations together: what lies beyond each rank, over everything."""
    total = lost = 0.0
    for spectrum in spectra:
        squares = [value * value for value in spectrum.singular_values]
        total += sum(squares)
        lost += sum(squares[spectrum.chosen_rank :])
    return float((lost / total) ** 0.5)


def wanted(patterns: list[str]) -> Iterator[tuple[str, Grouping | None, float]]:
    """Yield key, grouping (None for dense) and kept ratio of the rows to have, in the order of the table."""
    rows = [(DENSE, None, 1.0)] + [
        (f"{grouping.name}@{kept}", grouping, kept) for kept in KEPT_RATIOS for grouping in GROUPINGS
    ]
    yield from (row for row in rows if any(fnmatch(row[0], pattern) for pattern in patterns))


def load_rows(path: Path) -> dict[str, Row]:
    """Return the rows measured earlier, by key."""
    if not path.is_file():
        return {}
    rows = (Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
    return {row.key: row for row in rows}


def save(folder: Path, name: str, text: EvalText, rows: dict[str, Row]) -> None:
    """Write both result files, rows in the order of the table."""
    order = [key for key, _, _ in wanted(["*"])]
    ordered = [rows[key] for key in order if key in rows]
    data = {
        "model": name,
        "text": text.path.name,
        "tokens": text.limit,
        "context": text.context,
        "versions": library_versions(),
        "rows": [asdict(row) for row in ordered],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "groupings.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "groupings.md").write_text(page(name, text, ordered), encoding="utf-8")


def page(name: str, text: EvalText, rows: list[Row]) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    lines = [
        "# Joint groupings against separate matrices",
        f"{name}, floats. Perplexity in PyTorch on {text.path.name}: first {text.limit} tokens, windows of "
        f"{text.context} tokens that do not overlap, no beginning-of-sequence token. Error: Frobenius norm of "
        "the covered matrices' errors over that of the matrices. Plain truncation, no calibration data.",
        "Made by `python samples/factorize_groupings.py`; numbers with all digits: "
        "[groupings.json](groupings.json).",
        table(rows),
        "## Reading",
        "\n".join(f"- {line}" for line in reading(rows)) or "- Too few rows yet.",
    ]
    return "\n\n".join(lines) + "\n"


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = [
        "| matrices | grouping | kept, asked | kept, really | relative error | perplexity | nll ± s.e. |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join(
        head
        + [
            f"| {row.matrices or 'all'} | {row.grouping} | {row.asked} | {row.kept:.4f} | {row.relative_error:.4f} "
            f"| {row.perplexity:.4g} | {row.nll:.3f} ± {row.standard_error:.3f} |"
            for row in rows
        ]
    )


def reading(rows: list[Row]) -> Iterator[str]:
    """Yield what the numbers say: joint against separate where both are there, and collapses."""
    dense = next((row.perplexity for row in rows if row.grouping == DENSE), None)
    separate = {(row.matrices, row.asked): row for row in rows if row.grouping.endswith("separate")}
    for row in rows:
        other = separate.get((row.matrices, row.asked))
        if other is None or row is other:
            continue
        verdict = "better" if row.perplexity < other.perplexity else "worse"
        smaller = "smaller" if row.relative_error < other.relative_error else "larger"
        yield (
            f"{row.grouping} at {row.asked}: perplexity {row.perplexity:.4g}, {verdict} than {other.perplexity:.4g} "
            f"separate; its error is {smaller} ({row.relative_error:.4f} against {other.relative_error:.4f})."
        )
    fallen = [row.key for row in rows if dense is not None and row.perplexity > COLLAPSE * dense]
    if fallen:
        yield (
            f"Perplexity above {COLLAPSE} times the dense model's: {', '.join(fallen)}. Truncation without a metric is "
            "of no use there."
        )


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
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'gate*' or '*@0.9'"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    quiet_libraries()

    from rk_export.evaluation.assets import smollm2, wiki_text

    source = open_source(args.model or smollm2())
    name = args.model or "SmolLM2-135M-Instruct"
    text = EvalText(args.text or wiki_text("eval"), args.context, args.tokens)
    rows = load_rows(args.out / "groupings.json")
    short_name = Path(name).name
    for key, grouping, kept_ratio in wanted(args.rows):
        if key in rows:
            continue
        row = measure_dense(source, text) if grouping is None else measure(source, grouping, kept_ratio, text)
        logger.info(
            "%-24s perplexity %.4g, error %.4f, %.0f s", key, row.perplexity, row.relative_error, row.seconds
        )
        rows[key] = row
        save(args.out, short_name, text, rows)
    save(args.out, short_name, text, rows)


if __name__ == "__main__":
    main()
