"""Basis selection for a target task (Basel, 2405.15877) against plain truncation, by one command.

Rows that are in ``basel.json`` already are not measured again, and a training that was interrupted goes on where it
stood, so the command may be stopped and started at any time.

    python samples/basel_paper.py                               every row; writes docs/results/basel.{json,md,svg}
    python samples/basel_paper.py --rows 'dense' 'svd-*'
    python samples/basel_paper.py --model DIR --results /tmp/results --device cuda

Targets are arithmetic (GSM8K questions with solutions) and code (HumanEval and MBPP functions with descriptions). Every
model is judged on held-out items of both and on Wikipedia prose, which says what is lost outside the target.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import PreTrainedModel

from rk_export import CompressOptions, EvalText, RankRule
from rk_export.calibration.target_text import target_tokens
from rk_export.cli.main import quiet_libraries
from rk_export.commands.compression_inputs import compression_inputs
from rk_export.device import matmul_dtype, matmuls_in, resolve_device
from rk_export.evaluation.assets import smollm2, wiki_text
from rk_export.evaluation.measure import perplexity_of
from rk_export.evaluation.task_texts import code_text, gsm8k_text
from rk_export.folders import library_versions
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.basel.selection import select_basis
from rk_export.model.torch_logits import torch_logits
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import SINGLE_GROUPS
from rk_export.planning.planner import make_plan
from rk_export.report.records import Outcome
from rk_export.source.replaced import Replaced
from rk_export.source.stored import open_source

matplotlib.use("Agg")
import matplotlib.pyplot as plt

logger = logging.getLogger("basel_paper")

Rows = dict[str, dict[str, Any]]

TARGETS = {"arithmetic": gsm8k_text, "code": code_text}
WIKI = "wiki"
BASEL = "Basel, "
KEPT = (0.7, 0.5)
# What directions are judged by: the paper's magnitude and the alternatives, by target; last, magnitude in bases that
# are whitened by the task's inputs.
WHITENED = "whitened"
IMPORTANCES = {
    "arithmetic": ("magnitude", "gradient", "second-order", WHITENED),
    "code": ("magnitude", "gradient", WHITENED),
}
SEQUENCE = 512
TOKENS, CONTEXT = 5120, 512
STEPS = 60
LEARNING_RATE = 1e-2
WHITENED_RATE = 3e-3
CALIBRATION = 16384


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        name: Unique; groups of rows share a prefix.
        series: The method.
        target: The task whose text the method saw; None where it saw none.
        asked: Share of all linear parameters that was asked for.
        measure: Returns what is kept in the results.
    """

    name: str
    series: str
    target: str | None
    asked: float
    measure: Callable[[], dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """Where and how everything is measured.

    Args:
        model: HF folder of the dense model.
        work: Folder for the states of trainings.
        device: Where everything runs.
        steps: Steps of one basis selection.
        rate: Its learning rate.
        texts: Held-out text by name.
        training: The targets' texts to train on.
    """

    model: Path
    work: Path
    device: torch.device
    steps: int
    rate: float
    texts: Mapping[str, Path]
    training: Mapping[str, Path]

    def rows(self) -> list[Row]:
        """Return every row, in the order in which they are measured."""
        rows = [Row("dense", "dense", None, 1.0, self._dense)]
        rows += [Row(f"svd-{keep}", "SVD", None, keep, partial(self._svd, keep, None)) for keep in KEPT]
        for keep in KEPT:
            rows += [self._whitened_row(target, keep) for target in self.training]
            for target, importances in IMPORTANCES.items():
                rows += [self._basel_row(target, keep, importance) for importance in importances]
        return rows

    def _whitened_row(self, target: str, keep: float) -> Row:
        measure = partial(self._svd, keep, target)
        return Row(f"svdllm-{target}-{keep}", "SVD-LLM, target", target, keep, measure)

    def _basel_row(self, target: str, keep: float, importance: Any) -> Row:
        measure = partial(self._basel, target, keep, importance)
        return Row(f"basel-{target}-{keep}-{importance}", f"{BASEL}{importance}", target, keep, measure)

    def _dense(self) -> dict[str, Any]:
        return {"kept": 1.0, "perplexity": self._perplexities(open_source(self.model).load())}

    def _svd(self, keep: float, target: str | None) -> dict[str, Any]:
        """Truncate every matrix alone to the same share, under the second moment of the target's text or none."""
        calibration = CalibrationOptions("none")
        if target is not None:
            corpus = str(self.training[target])
            calibration = CalibrationOptions("corpus", corpus=corpus, tokens=CALIBRATION, gradients=False)
        options = CompressOptions(
            groups=SINGLE_GROUPS,
            rank=RankRule("keep", keep),
            rank_multiple=1,
            quant=None,
            embedding_quant=None,
            calibration=calibration,
            device=str(self.device),
        )
        ground = compression_inputs(open_source(self.model), options)
        rewritten = ground.rewrite(
            make_plan(ground.source, options, statistics=ground.statistics, table=ground.table)
        )
        applied = [finding for finding in rewritten.findings if finding.outcome is Outcome.APPLIED]
        pairs = [finding for finding in applied if finding.bytes_before]
        kept = sum(item.bytes_after for item in pairs) / sum(item.bytes_before for item in pairs)
        return {"kept": kept, "perplexity": self._perplexities(rewritten.model)}

    def _basel(self, target: str, keep: float, importance: Any) -> dict[str, Any]:
        source = open_source(self.model)
        text = self.training[target]
        whitened = importance == WHITENED
        options = BaselOptions(
            str(text),
            steps=self.steps,
            importance="magnitude" if whitened else importance,
            bases="whitened" if whitened else "plain",
            learning_rate=WHITENED_RATE if whitened else self.rate,
        )
        wanted = math.ceil(self.steps * options.batch_tokens / SEQUENCE)
        length = min(SEQUENCE, options.batch_tokens, int(source.config.max_position_embeddings))
        tokens = target_tokens(text, source.folder, length, wanted)
        state = self.work / f"basel-{target}-{keep}-{importance}-{self.steps}-{self.rate}.pt"
        rank = RankRule("keep", keep)
        selection = select_basis(source, tokens, rank, options, device=self.device, state=state)
        details = selection.finding.details or {}
        model = source.then(Replaced(selection.tensors)).load()
        wanted_details = ("kept", "steps", "tokens", "new_basis", "smallest_rank", "largest_rank", "dense")
        return {
            **{name: details[name] for name in wanted_details if name in details},
            "learning_rate": options.learning_rate,
            "text_tokens": tokens.numel(),
            "training_seconds": details["seconds"],
            "losses": [round(loss, 4) for _, loss in selection.losses],
            "perplexity": self._perplexities(model),
        }

    def _perplexities(self, model: PreTrainedModel) -> dict[str, list[float]]:
        """Return perplexity and its standard error by text, products in the type that the machine is fast in."""
        dtype, found = matmul_dtype(torch.device("cpu")), {}
        logits = torch_logits(model.to("cpu").float())
        with matmuls_in(dtype, torch.device("cpu")):
            for name, path in self.texts.items():
                result = perplexity_of(logits, EvalText(path, CONTEXT, TOKENS), self.model)
                found[name] = [round(result.perplexity, 4), round(result.perplexity_error, 4)]
        return found


def page(results: dict[str, Any]) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    rows: Rows = results["rows"]
    texts = list(next(iter(rows.values()))["perplexity"]) if rows else []
    lines = [
        "# Basis selection for a target task (2405.15877)",
        "",
        f"{results['model']}, floats. Perplexity on held-out items of each target and on Wikipedia prose: first",
        f"{results['tokens']:,} tokens of each text, windows of {results['context']}, matrix products in "
        f"{results['products']};",
        "± is one standard error over windows. Kept: what is stored of all linear layers' parameters, new bases",
        "included. SVD truncates every matrix to the same share, SVD-LLM (2403.07378) does so under the second moment",
        "of the target's training text; neither trains. Basel trains on that text while it drops directions.",
        "Made by `python samples/basel_paper.py`; all digits and the losses of each step: [basel.json](basel.json).",
        "",
        "![perplexity against kept share](basel.svg)",
        "",
        "| kept | method | target | " + " | ".join(texts) + " | training |",
        "| ---: | --- | --- | " + " | ".join("---:" for _ in texts) + " | --- |",
    ]
    for row in sorted(rows.values(), key=lambda row: (-row["asked"], row["target"] or "", row["series"])):
        cells = " | ".join(f"{value:.4g} ± {error:.3g}" for value, error in row["perplexity"].values())
        spent = ""
        if "steps" in row:
            minutes = row["training_seconds"] / 60
            spent = f"{row['steps']} steps, rate {row['learning_rate']:g}, {minutes:.0f} min"
        lines.append(f"| {row['kept']:.3f} | {row['series']} | {row['target'] or ''} | {cells} | {spent} |")
    lines += ["", "## Reading", ""]
    lines += [f"- {line}" for line in reading(rows)] or ["- Too few rows yet."]
    return "\n".join(lines) + "\n"


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
    truncated = f"; without training {' and '.join(without)}" if without else ""
    return (
        f"{target} at {keep}: perplexity {listed}{truncated}; the dense model, never trained on the task, has "
        f"{dense[target][0]:.4g}. With the best importance, outside the target: {elsewhere}."
        f"{verdict(rows, target, keep, best[target])}"
    )


def verdict(rows: Rows, target: str, keep: float, reached: list[float]) -> str:
    """Return whether training and selecting beats whitened truncation at the same size, which trains nothing."""
    row = rows.get(f"svdllm-{target}-{keep}")
    if row is None:
        return ""
    (value, error), (other, other_error) = reached, row["perplexity"][target]
    if abs(value - other) < 2 * math.hypot(error, other_error):
        return " It does not differ from SVD-LLM on the target's text by more than two standard errors."
    return f" It is {'better' if value < other else 'worse'} than SVD-LLM on the target's text."


def plot(rows: Rows, path: Path) -> None:
    """Draw, for each target, its perplexity against the kept share, a line a method."""
    figure, panels = plt.subplots(1, len(TARGETS), figsize=(11, 4.2))
    for axes, target in zip(panels, TARGETS, strict=True):
        for series in dict.fromkeys(row["series"] for row in rows.values()):
            points = sorted(
                (row["kept"], row["perplexity"][target][0])
                for row in rows.values()
                if row["series"] == series and row["target"] in (None, target)
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=series)
        axes.set_yscale("log")
        axes.set_xlabel("share of all linear parameters kept")
        axes.set_ylabel(f"perplexity, {target}, held out")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def machine(device: torch.device) -> str:
    """Return what a row was measured on."""
    cores = f"{os.cpu_count()} CPU cores"
    return f"{torch.cuda.get_device_name()}, {cores}" if device.type == "cuda" else cores


def measure(comparison: Comparison, results: dict[str, Any], patterns: list[str], folder: Path) -> None:
    """Measure the rows that are missing and write after each."""
    for row in comparison.rows():
        if row.name in results["rows"] or not any(fnmatch(row.name, pattern) for pattern in patterns):
            continue
        logger.info("== %s", row.name)
        start = time.perf_counter()
        found = row.measure()
        seconds = round(time.perf_counter() - start, 1)
        facts = {"series": row.series, "target": row.target, "asked": row.asked}
        results["rows"][row.name] = {
            **facts,
            **found,
            "seconds": seconds,
            "machine": machine(comparison.device),
        }
        logger.info("%s: %s, %.0f s", row.name, found["perplexity"], seconds)
        write(results, folder)
    write(results, folder)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write the three result files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "basel.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "basel.md").write_text(page(results), encoding="utf-8")
    plot(results["rows"], folder / "basel.svg")


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="HF folder (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--work", type=Path, default=Path("out/basel"), help="states of trainings")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="only rows that match")
    parser.add_argument("--steps", type=int, default=STEPS, help="of one basis selection")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    quiet_libraries()
    texts = {name: text("eval") for name, text in TARGETS.items()} | {WIKI: wiki_text("eval")}
    training = {name: text("train") for name, text in TARGETS.items()}
    model = args.model or smollm2()
    device = resolve_device(args.device)
    comparison = Comparison(model, args.work, device, args.steps, args.learning_rate, texts, training)
    path = args.results / "basel.json"
    rows: Rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}
    results = {
        "model": args.model.name if args.model else "SmolLM2-135M-Instruct",
        "tokens": TOKENS,
        "context": CONTEXT,
        "products": str(matmul_dtype(torch.device("cpu"))).removeprefix("torch."),
        "versions": library_versions(),
        "rows": rows,
    }
    measure(comparison, results, args.rows, args.results)


if __name__ == "__main__":
    main()
