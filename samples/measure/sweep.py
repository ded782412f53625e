"""Quality against size, by one command: kept ratios in floats, whole files from a byte budget, and the peer.

    python samples/measure/sweep.py                               every row; writes docs/results/pareto.{json,md,svg}
    python samples/measure/sweep.py --rows 'kept-*' --device cuda
    python samples/measure/sweep.py --model DIR --out /tmp/results

Sizes are judged on a copy of the model that is exactly reparameterized first (norm gains folded, values rotated
inside heads, FFN neurons scaled): the weights of the packaged SmolLM2 lie on a 4-bit grid already, and untouched
they would flatter every quantizer. The peer is onnxruntime-genai's own builder, on the same copy.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from assets import news_text, wiki_text
from measure import harness
from measure.harness import Measure, Results, Row, Rows

from rk_export import (
    Budget,
    CalibrationOptions,
    EvalText,
    Factorize,
    HealOptions,
    Recipe,
    Run,
    compress,
    open_source,
    perplexity_of,
    prepare,
    rewrite_model,
    torch_logits,
)
from rk_export.runtime import Session

TEXT = "wiki"  # the text whose perplexity is drawn
KEPT = (0.95, 0.9, 0.8)
MEGABYTES = (75, 80, 90, 99, 115, 140)
TEXTS = {"wiki": partial(wiki_text, "eval"), "news": news_text}
TOKENS, CONTEXT = 5120, 512
FRONT_CLIP = 45.0  # perplexity that the front page still shows
HEAL_STEPS = 96
TEXT_METRIC = CalibrationOptions("self", tokens=16384)
SINGLE = ("q", "k", "v", "o", "gate", "up", "down")
OFF_GRID = ("fold", "rotate-heads", "scale")
# onnxruntime-genai 0.18 writes the same file whatever its builder's options of blocks and algorithms say.
PEERS: dict[str, tuple[str, ...]] = {"int4": ()}


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

    def rows(self) -> Iterator[tuple[str, Measure]]:
        """Yield every row of the sweep; each says the line it belongs to and where it stands on it."""
        yield "dense", partial(self.row, "dense", 1.0, self.dense)
        for keep in KEPT:
            for series, options in kept_series(keep).items():
                yield f"kept-{series}-{keep}", partial(self.row, series, keep, partial(self.kept, options))
        for keep in (0.9, 0.8):
            options = kept_series(keep)["rk-export"].with_step(HealOptions(HEAL_STEPS))
            yield f"healed-{keep}", partial(self.row, "healed", keep, partial(self.kept, options))
        for size in MEGABYTES:
            yield f"size-{size}", partial(self.row, "rk-export", size, partial(self.sized, size))
        if importlib.util.find_spec("onnxruntime_genai"):
            for name, flags in PEERS.items():
                yield (
                    f"peer-{name}",
                    partial(self.row, "onnxruntime-genai", 0.0, partial(self.peer, name, flags)),
                )

    def row(self, series: str, x: float, measure: Measure) -> Row:
        """Measure a row and say where it is drawn: at the share that was kept, or at the files' megabytes."""
        found = measure()
        x = found["file_bytes"] / 1e6 if "file_bytes" in found else x
        return {"series": series, "x": x, "machine": harness.machine(self.device), **found}

    def dense(self) -> Row:
        """Evaluate the dense model."""
        return {"perplexity": perplexities(torch_logits(open_source(self.model).load()), self.model)}

    def kept(self, recipe: Recipe) -> Row:
        """Compress in floats, and heal where the options ask for it."""
        rewritten = rewrite_model(self.model, recipe, run=Run(device=self.device))
        found = perplexities(torch_logits(rewritten.model.float()), self.model)
        return {"predicted_loss": rewritten.plan.predicted_loss, "perplexity": found}

    def sized(self, megabytes: float) -> Row:
        """Compress into a bundle of a size."""
        recipe = Recipe.load("default").with_budget(Budget("size", megabytes * 1e6))
        bundle = self.work / f"size-{megabytes}"
        run = Run(device=self.device, threads=self.threads)
        report = compress(self.off_grid(), bundle, recipe, run=run, force=True)
        return self.bundle(bundle) | {"timings": report.timings}

    def peer(self, name: str, options: tuple[str, ...]) -> Row:
        """Build with onnxruntime-genai."""
        bundle = self.work / f"peer-{name.replace(' ', '-')}"
        extra = ["--extra_options", *options] if options else []
        subprocess.run([*harness.genai_builder(self.off_grid(), bundle), *extra], check=True)
        return self.bundle(bundle)

    def bundle(self, bundle: Path) -> Row:
        """Evaluate a bundle in ONNX Runtime."""
        session = Session.from_pretrained(bundle, provider="cpu", threads=self.threads)
        found = perplexities(session.prefill_logits, self.model)
        return {"file_bytes": harness.model_bytes(bundle), "perplexity": found}

    def off_grid(self) -> Path:
        """Return the reparameterized copy of the model, made once."""
        folder = self.work / "off-grid"
        if not folder.exists():
            prepare(self.model, folder, OFF_GRID, seed=7)
        return folder


def kept_series(keep: float) -> dict[str, Recipe]:
    """Return the methods that are compared at one kept share of all linear parameters, in floats.

    `paper 1` is 2402.16319 (joint q/k and gate/up, the others alone, no metric), `SVD-LLM` 2403.07378 (whitening,
    every matrix alone), `joint + identity` the same statistics on joint groups in the identity form. All three keep
    the same share of every matrix; only `rk-export` spends one budget over all.
    """
    joint = ("qk", "gate_up", "v", "o", "down")
    whitened = CalibrationOptions("self", tokens=TEXT_METRIC.tokens, gradients=False)
    plain = Factorize(joint, keep=keep, rank_multiple=1)
    return {
        "paper 1": Recipe((plain,), CalibrationOptions("none")),
        "SVD-LLM": Recipe((replace(plain, groups=SINGLE),), whitened),
        "joint + identity": Recipe((replace(plain, form="identity"),), whitened),
        "rk-export": Recipe((Factorize(rank_multiple=1),), TEXT_METRIC, Budget("keep", keep)),
    }


def perplexities(logits: Any, model: Path) -> dict[str, list[float]]:
    """Return perplexity and its standard error by text."""
    found, tokenizer = {}, open_source(model).folder
    for name, path in TEXTS.items():
        result = perplexity_of(logits, EvalText(path(), CONTEXT, TOKENS), tokenizer)
        found[name] = [round(result.perplexity, 4), round(result.perplexity_error, 4)]
    return found


def page(results: Results) -> str:
    """Return the results as Markdown."""
    rows = results.rows
    kept, sized = kept_rows(rows), sized_rows(rows)
    texts = list(next(iter(rows.values()))["perplexity"]) if rows else []
    head = [f"perplexity, {text}" for text in texts]
    lines = [
        "# Quality against size",
        "",
        "This page shows how much quality SmolLM2-135M-Instruct loses at a given size. Lower perplexity is better.",
        "",
        "Each text is cut to its first 5,120 tokens, in windows of 512. ± is one standard error over windows. Made by "
        "`python samples/measure/sweep.py`. The data, with the machine of each row, lies in `pareto.json`.",
        "",
        "![perplexity against kept share and against file size](pareto.svg)",
        "",
    ]
    if "dense" in rows:
        values = [f"{cell} ({text})" for text, cell in zip(texts, cells(rows["dense"]), strict=True)]
        lines += [f"Dense, PyTorch: {', '.join(values)}", ""]
    if kept:
        ordered = sorted(kept.values(), key=lambda row: (-row["x"], row["perplexity"][TEXT][0]))
        found = [[row["x"], row["series"], *cells(row)] for row in ordered]
        lines += ["## Share of all linear parameters kept, floats", ""]
        lines += [harness.table(["kept", "method", *head], found, "  " + "r" * len(head)), ""]
    if sized:
        smallest_first = sorted(sized.items(), key=lambda item: item[1]["x"])
        found = [
            [f"{row['x']:.1f}", f"{row['series']} ({name})", *cells(row)] for name, row in smallest_first
        ]
        lines += ["## Whole files, through ONNX Runtime on CPU", ""]
        lines += [harness.table(["MB", "made by", *head], found, "r " + "r" * len(head)), ""]
    return "\n".join(lines)


def kept_rows(rows: Rows) -> Rows:
    """Return the rows in floats."""
    return {name: row for name, row in rows.items() if name.startswith(("kept-", "healed-"))}


def sized_rows(rows: Rows) -> Rows:
    """Return the rows that are files."""
    return {name: row for name, row in rows.items() if "file_bytes" in row}


def cells(row: Row) -> list[str]:
    """Return the perplexity of a row on each text."""
    return [f"{value:.2f} ± {error:.2f}" for value, error in row["perplexity"].values()]


@harness.styled
def draw(rows: Rows, path: Path) -> None:
    """Draw perplexity against the kept share and against the size."""
    figure, panels = harness.new_figure(1, 2, 4.6)
    left, right = panels[0]
    draw_series(left, kept_rows(rows), "share of all linear parameters kept, floats", clip=200.0)
    draw_series(right, sized_rows(rows), "model.onnx and its data, MB", clip=70.0)
    for panel in (left, right):
        if "dense" in rows:
            panel.axhline(rows["dense"]["perplexity"][TEXT][0], color="grey", linewidth=0.8, label="dense")
        harness.legend(panel)
    harness.save_figure(figure, path)


@harness.styled
def draw_front(rows: Rows, path: Path) -> None:
    """Draw the picture of the front page: files of every exporter, each peer with its settings."""
    figure, panels = harness.new_figure(1, 1, 4.6)
    panel = panels[0][0]
    sized = sized_rows(rows)
    draw_series(
        panel, {k: row for k, row in sized.items() if row["series"] == "rk-export"}, "files, MB", clip=70.0
    )
    for name, row in sized.items():
        if row["series"] != "rk-export" and row["perplexity"][TEXT][0] <= FRONT_CLIP:
            point = (row["x"], row["perplexity"][TEXT][0])
            panel.plot(*point, marker="s", markersize=5, color=harness.COLORS[1], linestyle="")
            label = f"{row['series']}, {name.removeprefix('peer-')}"
            panel.annotate(label, point, xytext=(6, 2), textcoords="offset points", fontsize=7)
    if "dense" in rows:
        panel.axhline(
            rows["dense"]["perplexity"][TEXT][0], color="grey", linewidth=0.8, label="dense, 538 MB"
        )
    harness.legend(panel)
    harness.save_figure(figure, path)


def draw_series(panel: Any, rows: Mapping[str, Row], label: str, clip: float) -> None:
    """Draw one line a series; values above `clip` are left to the table."""
    for series in dict.fromkeys(row["series"] for row in rows.values()):
        points = sorted(
            (row["x"], *row["perplexity"][TEXT])
            for row in rows.values()
            if row["series"] == series and row["perplexity"][TEXT][0] <= clip
        )
        if points:
            x, y, error = zip(*points, strict=True)
            panel.errorbar(x, y, yerr=error, marker="o", markersize=4, capsize=2, label=series)
    panel.set(xlabel=label, ylabel="perplexity, Wikipedia")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the results."""
    parser = harness.parser(__doc__, "model", "rows")
    parser.add_argument("--work", type=Path, default=Path("out/sweep"), help="folder of bundles")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    sweep = Sweep(harness.model_of(args), args.work, args.device, args.threads)
    sweep.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.out, "pareto", {"model": harness.model_name(args)})
    results.measure(sweep.rows(), args.rows)
    results.write_page(page(results))
    draw(results.rows, args.out / "pareto.svg")
    draw_front(results.rows, args.out / "frontier.svg")


if __name__ == "__main__":
    sys.exit(main())
