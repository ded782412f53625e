"""Quality against size, by one command: kept ratios in floats, whole files from a byte budget, and the peer.

Rows that are in ``pareto.json`` already are not measured again, so an interrupted sweep goes on where it stopped.

    python samples/sweep.py                               every row; writes docs/results/pareto.{json,md,svg}
    python samples/sweep.py --rows 'kept-*' --device cuda
    python samples/sweep.py --model DIR --results /tmp/results

Sizes are judged on a copy of the model that is exactly reparameterized first (norm gains folded, values rotated
inside heads, FFN neurons scaled): the weights of the packaged SmolLM2 lie on a 4-bit grid already, and untouched
they would flatter every quantizer. The peer is onnxruntime-genai's own builder, on the same copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch

from rk_export import CompressOptions, EvalText, RankRule, compress
from rk_export.calibration.neuron_peaks import neuron_peaks
from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.cli.main import quiet_libraries
from rk_export.commands.compression_inputs import compression_inputs
from rk_export.evaluation.assets import news_text, smollm2, wiki_text
from rk_export.evaluation.measure import perplexity_of
from rk_export.folders import library_versions
from rk_export.methods.heal.distil import heal
from rk_export.methods.heal.options import HealOptions
from rk_export.model.torch_logits import torch_logits
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import SINGLE_GROUPS, Budget
from rk_export.options.run import Run
from rk_export.planning.planner import make_plan
from rk_export.runtime import Session
from rk_export.source.prepared import save_prepared
from rk_export.source.stored import open_source
from rk_export.text import LogitsFn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

logger = logging.getLogger("sweep")

Rows = dict[str, dict[str, Any]]
# The text whose perplexity is drawn.
TEXT = "wiki"

KEPT = (0.95, 0.9, 0.8)
MEGABYTES = (75, 80, 86.5, 92, 99, 107, 115, 125, 140)
TEXTS = {"wiki": partial(wiki_text, "eval"), "news": news_text}
TOKENS, CONTEXT = 5120, 512
HEAL_STEPS = 96
TEXT_METRIC = CalibrationOptions("self", tokens=16384)
OFF_GRID = ("fold", "rotate-heads", "scale")
PEERS: dict[str, tuple[str, ...]] = {
    "int4 block 128": ("int4_block_size=128",),
    "int4": (),
    "int4 rtn": ("int4_algo_config=rtn",),
    "int4 k_quant": ("int4_algo_config=k_quant",),
    "int4 k_quant_mixed": ("int4_algo_config=k_quant_mixed",),
    "int4 block 16": ("int4_block_size=16",),
}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        name: Unique; groups of rows share a prefix.
        series: The line it belongs to in the plots.
        x: Kept share, or megabytes.
        measure: Returns what is kept in the results.
    """

    name: str
    series: str
    x: float
    measure: Callable[[], dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Sweep:
    """Where the sweep works.

    Args:
        model: HF folder of the dense model.
        work: Folder for what is made on the way.
        device: Where factorization and quantization run.
        threads: Threads of ONNX Runtime.
    """

    model: Path
    work: Path
    device: str
    threads: int

    def rows(self) -> list[Row]:
        """Return every row of the sweep."""
        rows = [Row("dense", "dense", 1.0, self._dense)]
        for keep in KEPT:
            for series, options in kept_series(keep, self.device).items():
                rows.append(Row(f"kept-{series}-{keep}", series, keep, lambda o=options: self._kept(o)))
        for keep in (0.9, 0.8):
            options = kept_series(keep, self.device)["rk-export"]
            rows.append(
                Row(f"healed-{keep}", "healed", keep, lambda o=options: self._kept(o, heal_steps=HEAL_STEPS))
            )
        rows += [Row(f"size-{mb}", "rk-export", mb, lambda mb=mb: self._sized(mb)) for mb in MEGABYTES]
        if importlib.util.find_spec("onnxruntime_genai"):
            rows += [
                Row(f"peer-{name}", "onnxruntime-genai", 0.0, lambda n=name, o=options: self._peer(n, o))
                for name, options in PEERS.items()
            ]
        return rows

    def _dense(self) -> dict[str, Any]:
        return {"perplexity": perplexities(torch_logits(open_source(self.model).load()), self.model)}

    def _kept(self, options: CompressOptions, heal_steps: int = 0) -> dict[str, Any]:
        ground = compression_inputs(open_source(self.model), options)
        plan = make_plan(ground.source, options, statistics=ground.statistics, table=ground.table)
        rewritten = ground.rewrite(plan)
        found: dict[str, Any] = {"predicted_loss": plan.predicted_loss}
        if heal_steps:
            how = HealOptions(steps=heal_steps)
            wanted = CalibrationOptions("self", tokens=heal_steps * how.batch_tokens, seed=1)
            tokens = calibration_tokens(ground.source, wanted, torch.device(self.device))
            result = heal(rewritten, ground.source, tokens, how)
            found |= {"heal_seconds": round(result.seconds, 1), "heal_tokens": result.tokens}
        return found | {"perplexity": perplexities(torch_logits(rewritten.model.float()), self.model)}

    def _sized(self, megabytes: float) -> dict[str, Any]:
        budget = Budget("size", megabytes * 1e6)
        options = CompressOptions(budget=budget, calibration=TEXT_METRIC, device=self.device)
        bundle = self.work / f"size-{megabytes}"
        report = compress(self.off_grid(), bundle, options, run=Run(threads=self.threads), force=True)
        return self._bundle(bundle) | {"timings": report.timings}

    def _peer(self, name: str, options: tuple[str, ...]) -> dict[str, Any]:
        bundle = self.work / f"peer-{name.replace(' ', '-')}"
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        extra = ["--extra_options", *options] if options else []
        subprocess.run([*builder, "-i", str(self.off_grid()), "-o", str(bundle), *extra], check=True)
        return self._bundle(bundle)

    def _bundle(self, bundle: Path) -> dict[str, Any]:
        files = sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        session = Session.from_pretrained(bundle, provider="cpu", threads=self.threads)
        return {"file_bytes": files, "perplexity": perplexities(session.prefill_logits, self.model)}

    def off_grid(self) -> Path:
        """Return the reparameterized copy of the model, made once."""
        folder = self.work / "off-grid"
        if not folder.exists():
            source = open_source(self.model)
            tokens = calibration_tokens(source, CalibrationOptions("self", tokens=2048), torch.device("cpu"))
            peaks = neuron_peaks(source, tokens, torch.device("cpu"))
            save_prepared(source, OFF_GRID, folder, seed=7, peaks=peaks, alpha=0.25, force=False)
        return folder


def kept_series(keep: float, device: str) -> dict[str, CompressOptions]:
    """Return the methods that are compared at one kept share of all linear parameters, in floats.

    `paper 1` is 2402.16319 (joint q/k and gate/up, the others alone, no metric), `SVD-LLM` 2403.07378 (whitening,
    every matrix alone), `joint + identity` the same statistics on joint groups in the identity form. All three keep
    the same share of every matrix; only `rk-export` spends one budget over all.
    """
    joint = ("qk", "gate_up", "v", "o", "down")
    whitened = CalibrationOptions("self", tokens=TEXT_METRIC.tokens, gradients=False)
    floats: dict[str, Any] = {"quant": None, "embedding_quant": None, "device": device, "rank_multiple": 1}
    rule: dict[str, Any] = {"rank": RankRule("keep", keep), **floats}
    return {
        "paper 1": CompressOptions(groups=joint, calibration=CalibrationOptions("none"), **rule),
        "SVD-LLM": CompressOptions(groups=SINGLE_GROUPS, calibration=whitened, **rule),
        "joint + identity": CompressOptions(groups=joint, calibration=whitened, form="identity", **rule),
        "rk-export": CompressOptions(budget=Budget("keep", keep), calibration=TEXT_METRIC, **floats),
    }


def perplexities(logits: LogitsFn, model: Path) -> dict[str, list[float]]:
    """Return perplexity and its standard error by text."""
    found = {}
    for name, path in TEXTS.items():
        result = perplexity_of(logits, EvalText(path(), CONTEXT, TOKENS), model)
        found[name] = [round(result.perplexity, 4), round(result.perplexity_error, 4)]
    return found


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
        "windows. Made by `python samples/sweep.py`; data, with the machine of each row, in `pareto.json`.",
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


def machine(device: str) -> str:
    """Return what a row was measured on."""
    cores = f"{os.cpu_count()} CPU cores"
    return f"{torch.cuda.get_device_name()}, {cores}" if device.startswith("cuda") else cores


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="HF folder (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--work", type=Path, default=Path("out/sweep"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--rows", default="*", help="only rows whose name matches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    sweep = Sweep(args.model or smollm2(), args.work, args.device, args.threads)
    sweep.work.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "pareto.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    results["versions"] = library_versions()
    for row in sweep.rows():
        if row.name in results["rows"] or not fnmatch(row.name, args.rows):
            continue
        logger.info("== %s", row.name)
        start = time.perf_counter()
        found = row.measure()
        seconds = round(time.perf_counter() - start, 1)
        x = found["file_bytes"] / 1e6 if "file_bytes" in found else row.x
        facts = {"series": row.series, "x": x, "machine": machine(args.device)}
        results["rows"][row.name] = facts | found | {"seconds": seconds}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        logger.info("%s %s", row.name, found["perplexity"])
    write_report(results, args.results)


if __name__ == "__main__":
    main()
