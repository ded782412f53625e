"""Global rank and sparsity optimization (2505.03801) against its parts and against pruning, by perplexity.

For each kept share of the linear layers' parameters: CAP as published (policy gradient), what its search starts
from, low rank alone, our auction over mixtures that are fitted anew, and pruning by magnitude and by Wanda
(2306.11695). All methods that use data see the same calibration text. Nothing is quantized or exported: matrices
are replaced in the PyTorch model, which is evaluated.

    python samples/cap_paper.py                      all rows that are not in the results yet
    python samples/cap_paper.py --rows 'policy@*'    some of them

Writes ``cap.json`` after every row, so that an interrupted run goes on where it stopped, and ``cap.md``,
``cap.svg`` and ``cap_allocation.svg`` from it. Pools, statistics and the policy's states are cached besides.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rk_export import CompressOptions, EvalText
from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.layer_statistics import FromDense
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.cli.main import quiet_libraries
from rk_export.evaluation.measure import perplexity_of
from rk_export.folders import library_versions
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.auction import auction_selection, selection_of_each
from rk_export.methods.cap.baselines import magnitude, wanda
from rk_export.methods.cap.choose import most_probable
from rk_export.methods.cap.mixture import Mixtures, mixture_selection, offered_mixtures, refitted_parts
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.cap.policy import Learned, first_probabilities, learn
from rk_export.methods.cap.pools import Pools, make_pools
from rk_export.methods.cap.scores import Score, all_scores, curvature_score, directions_only, energy_score
from rk_export.methods.sparse_sites import PARAMETERS, Prices, amount_of, linear_shapes, over_dense
from rk_export.model.torch_logits import torch_logits
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import SINGLE_GROUPS, Budget
from rk_export.passes.numerics.gaps import encode_gaps
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, split_columns
from rk_export.planning.planner import make_plan
from rk_export.report.svg import new_figure, save_figure, styled
from rk_export.rewrite.apply import rewrite
from rk_export.source.stored import StoredModel, open_source

logger = logging.getLogger("cap_paper")

KEPT = (0.8, 0.5)
# The search from energies is run at this share only.
ENERGY_KEPT = 0.5
DENSE, WHOLE = "dense", "split"
POLICY, AUCTION, BLIND_POLICY, ENERGY, MIXTURE = "policy", "auction", "policy-energy", "energy", "mixture"
TITLES = {
    DENSE: "dense",
    WHOLE: "RPCA split, all of it",
    POLICY: "CAP: policy gradient, from curvature",
    AUCTION: "CAP's candidates by curvature (auction; the policy's start)",
    "policy-refitted": "CAP: policy gradient, low rank refitted",
    "auction-refitted": "CAP's candidates by curvature, low rank refitted",
    BLIND_POLICY: "CAP: policy gradient, from energies",
    ENERGY: "CAP's candidates by energy (that policy's start)",
    "split-each": "CAP's candidates by energy, each matrix alike",
    MIXTURE: "rk-export: auction over fitted mixtures",
    "low-rank-pool": "low rank alone: CAP's directions by curvature",
    "low-rank-svd": "low rank alone: SVD under curvature, planned",
    "magnitude-global": "magnitude, all matrices together",
    "magnitude-matrix": "magnitude, each matrix alike",
    "wanda": "Wanda, each row alike",
}
# A search, and what it starts from.
SEARCHES = {POLICY: AUCTION, BLIND_POLICY: ENERGY}
# Stored in half precision: a factor's number, an entry with its gap byte, a number of a dense column.
HALF = Prices(2, 3, 2)
DRAWN = (POLICY, AUCTION, MIXTURE)  # in the picture of the allocation
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
Record = dict[str, Any]


@dataclass(frozen=True)
class Workshop:
    """What all rows share; each part is made when it is first needed.

    Args:
        source: The dense model.
        calibration: The text of statistics and policy.
        options: Of CAP.
        text: Where perplexity is measured.
        device: Where matrices are split and the model runs.
    """

    source: StoredModel
    calibration: CalibrationOptions
    options: CapOptions
    text: EvalText
    device: torch.device

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration text (sequences, length)."""
        return calibration_tokens(self.source, self.calibration, self.device)

    @cached_property
    def statistics(self) -> DenseStatistics:
        """Curvature of the dense model on the calibration text."""
        half = self.calibration.tokens // 2
        return dense_statistics(
            self.source,
            self.tokens,
            diagonal=False,
            device=self.device,
            gradient_tokens=half,
        )

    @cached_property
    def pools(self) -> Pools:
        """CAP's candidates."""
        return make_pools(self.source, self.options.iterations, self.device)

    def amount(self, keep: float) -> float:
        """Return the parameters that a kept share leaves."""
        return amount_of(self.source, Budget("keep", keep))[0]

    @cached_property
    def mixtures(self) -> dict[MatrixId, Mixtures]:
        """What every matrix may become in our auction."""
        return offered_mixtures(self.source, self.statistics, self.device)

    def score(self, name: str) -> Score:
        """Return the score of candidates by curvature or by energy."""
        by_curvature = name in (POLICY, AUCTION)
        return curvature_score(PARAMETERS, self.statistics) if by_curvature else energy_score(PARAMETERS)

    def learned(self, method: str, keep: float) -> Learned:
        """Return the outcome of a search."""
        scores, amount = all_scores(self.score(method), self.pools), self.amount(keep)
        first = first_probabilities(self.pools, scores, PARAMETERS, amount)
        return learn(
            self.source,
            self.pools,
            first,
            amount,
            PARAMETERS,
            self.options,
            tokens=self.tokens,
            device=self.device,
        )

    def choice(self, method: str, keep: float) -> Mapping[MatrixId, Parts]:
        """Return what replaces the matrices."""
        if method == WHOLE:
            return {place: pool.parts for place, pool in self.pools.items()}
        amount = self.amount(keep)
        if method.endswith("-refitted"):
            chosen = self.choice(method.removesuffix("-refitted"), keep)
            return refitted_parts(self.source, chosen, self.statistics, self.device)
        if method in SEARCHES:
            return most_probable(self.pools, self.learned(method, keep).probabilities, amount, PARAMETERS)
        if method in SEARCHES.values():
            return auction_selection(self.score(method), self.pools, amount, PARAMETERS)
        if method == "split-each":
            return selection_of_each(self.score(ENERGY), self.pools, amount, PARAMETERS)
        if method == "low-rank-pool":
            return auction_selection(directions_only(self.score(AUCTION)), self.pools, amount, PARAMETERS)
        if method == MIXTURE:
            return mixture_selection(
                self.source, self.mixtures, amount, PARAMETERS, self.statistics, self.device
            )
        if method == "wanda":
            return wanda(self.source, keep, self.statistics)
        return magnitude(self.source, keep, "global" if method == "magnitude-global" else "matrix")

    def measure(self, method: str, keep: float) -> Record:
        """Return one row of the results."""
        start = time.perf_counter()
        if method == DENSE:
            return self._row(self.source.load(), start)
        if method == "low-rank-svd":
            return self._svd(keep, start)
        parts = self.choice(method, keep)
        model = self.source.load()
        layers = model.get_submodule(self.source.architecture.layers)
        for (layer, path), item in parts.items():
            layers.get_submodule(f"{layer}.{path}").weight.data.copy_(item.dense())
        row = self._row(model, start) | self._facts(parts)
        return row | ({"losses": self.learned(method, keep).losses} if method in SEARCHES else {})

    def _svd(self, keep: float, start: float) -> Record:
        options = CompressOptions(
            groups=SINGLE_GROUPS,
            budget=Budget("keep", keep),
            form="plain",
            rank_multiple=1,
            quant=None,
            embedding_quant=None,
            prepare=(),
            calibration=self.calibration,
            device=str(self.device),
        )
        plan = make_plan(self.source, options, statistics=self.statistics)
        rewritten = rewrite(self.source, plan, statistics=FromDense(self.statistics))
        shapes = linear_shapes(self.source)
        kept = 0
        for site in plan.sites:
            rows, columns = shapes[site.layer, site.paths[0]]
            kept += rows * columns if site.form == "dense" else site.rank * (rows + columns)
        share = kept / sum(rows * columns for rows, columns in shapes.values())
        return self._row(rewritten.model.float(), start) | {"kept": share, "bytes": share}

    def _row(self, model: PreTrainedModel, start: float) -> Record:
        result = perplexity_of(torch_logits(model), self.text, self.source.folder)
        return {
            "perplexity": result.perplexity,
            "nll": result.nll,
            "standard_error": result.standard_error,
            "kept": 1.0,
            "bytes": 1.0,
            "seconds": round(time.perf_counter() - start, 1),
        }

    def _facts(self, parts: Mapping[MatrixId, Parts]) -> Record:
        """Return what a choice keeps, in all and by matrix."""
        numbers = sum(item.shape[0] * item.shape[1] for item in parts.values())
        roles = {
            (layer, item.path): item.role
            for layer in range(self.source.layer_count)
            for item in self.source.architecture.projections(self.source.config, layer)
        }
        allocation: dict[str, list[list[float]]] = {}
        for (layer, path), item in parts.items():
            size = item.shape[0] * item.shape[1]
            shares = [round(item.rank * sum(item.shape) / size, 4), round(item.entries / size, 4)]
            allocation.setdefault(roles[layer, path], []).append(shares)
        return {
            "kept": sum(item.parameters for item in parts.values()) / numbers,
            "bytes": sum(stored_bytes(item) for item in parts.values()) / (HALF.number * numbers),
            "low_rank": sum(item.rank * sum(item.shape) for item in parts.values()) / numbers,
            "over_dense": len(over_dense(parts)),
            "allocation": allocation,
        }


def stored_bytes(parts: Parts) -> float:
    """Return the bytes of factors, dense columns with their places, and entries with one-byte gaps."""
    rows = parts.shape[0]
    split = split_columns(
        parts.shape,
        parts.indices,
        parts.values,
        dense_bytes=HALF.column + 4 / rows,
        sparse_bytes=HALF.entry,
    )
    gaps, _ = encode_gaps(split.indices, split.values)
    columns = len(split.columns) * (rows * HALF.column + 4)
    return HALF.number * parts.rank * sum(parts.shape) + columns + HALF.entry * len(gaps)


def wanted(patterns: list[str]) -> Iterator[tuple[str, str, float]]:
    """Yield key, method and kept share of the rows to have, in the order of the table."""
    rows = [(DENSE, DENSE, 1.0), (WHOLE, WHOLE, 1.0)]
    methods = [name for name in TITLES if name not in (DENSE, WHOLE)]
    blind = (BLIND_POLICY, ENERGY)
    rows += [
        (f"{method}@{keep}", method, keep)
        for keep in KEPT
        for method in methods
        if method not in blind or keep == ENERGY_KEPT
    ]
    yield from (row for row in rows if any(fnmatch(row[0], pattern) for pattern in patterns))


def write_report(results: Record, folder: Path) -> None:
    """Write page and figures from the rows measured so far."""
    order = [key for key, _, _ in wanted(["*"])]
    rows = {key: results["rows"][key] for key in order if key in results["rows"]}
    (folder / "cap.md").write_text(page(results, rows), encoding="utf-8")
    draw_perplexities(rows, folder / "cap.svg")
    draw_allocation(rows, folder / "cap_allocation.svg")


def page(results: Record, rows: Mapping[str, Record]) -> str:
    """Return the results as Markdown: protocol, table, what it shows."""
    options = results["cap"]
    lines = [
        "# Global rank and sparsity: CAP and what it is compared with",
        f"{results['model']}, floats, all matrices of the decoder layers. Perplexity in PyTorch on {results['text']}: "
        f"first {results['tokens']} tokens, windows of {results['context']} that do not overlap, no "
        f"beginning-of-sequence token, float32. Calibration, for all methods that use any: {results['calibration']}.",
        f"Robust principal components: {options['iterations']} steps. Policy: {options['steps']} steps of "
        f"{options['batch_tokens']} tokens, learning rate {options['learning_rate']}, window {options['window']}, "
        f"seed {options['seed']}. A direction of an (out, in) matrix counts as out + in parameters, a sparse entry as "
        "one. Bytes: share of the dense matrices' in half precision, with factors and entries in half precision, a gap "
        "byte for each entry's place, and columns stored dense where that is smaller.",
        "Made by `python samples/cap_paper.py`; numbers with all digits, every matrix' shares and the policy's losses: "
        "[cap.json](cap.json).",
        table(rows),
        "![perplexity by method, and the policy's losses](cap.svg)",
        "![rank share and sparse density of every matrix](cap_allocation.svg)",
        "## Reading",
        "\n".join(f"- {line}" for line in reading(rows)) or "- Too few rows yet.",
    ]
    return "\n\n".join(lines) + "\n"


def table(rows: Mapping[str, Record]) -> str:
    """Return the rows as a Markdown table."""
    head = [
        "| asked | method | kept | of it low rank | bytes | perplexity | nll ± s.e. | above dense |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    lines = []
    for row in rows.values():
        low_rank = f"{row['low_rank'] / row['kept']:.1%}" if "low_rank" in row else ""
        lines.append(
            f"| {row['asked']:g} | {TITLES[row['method']]} | {row['kept']:.3f} | {low_rank} | {row['bytes']:.3f} "
            f"| {row['perplexity']:.4g} | {row['nll']:.3f} ± {row['standard_error']:.3f} "
            f"| {row.get('over_dense', '')} |"
        )
    return "\n".join(head + lines)


def reading(rows: Mapping[str, Record]) -> Iterator[str]:
    """Yield what the numbers say."""
    if WHOLE in rows and DENSE in rows:
        whole = rows[WHOLE]
        yield (
            f"The split itself, nothing left out, holds {whole['kept']:.2f} times the dense parameters "
            f"({whole['low_rank']:.2f} in directions) and gives perplexity {whole['perplexity']:.4g} against "
            f"{rows[DENSE]['perplexity']:.4g}: the candidates are redundant, and every budget has to break up what the "
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


def _ranking(keep: float, here: Mapping[str, Record]) -> Iterator[str]:
    order = sorted(here.values(), key=lambda row: float(row["perplexity"]))
    names = ", ".join(f"{TITLES[row['method']]} {row['perplexity']:.4g}" for row in order)
    yield f"At {keep:g}, from best to worst: {names}."


def _search(policy: Record, start: Record) -> Iterator[str]:
    losses = policy["losses"]
    tenth = max(1, len(losses) // 10)
    first, last = losses[:tenth], losses[-tenth:]
    before, after = sum(first) / tenth, sum(last) / tenth
    squares = sum((x - before) ** 2 for x in first) + sum((x - after) ** 2 for x in last)
    error = math.sqrt(squares / max(1, 2 * tenth - 2) * 2 / tenth)
    moved = policy["nll"] - start["nll"]
    yield (
        f"{TITLES[policy['method']]}, at {policy['asked']:g}: the loss of sampled masks, counted from the start's "
        f"top-K on the same tokens, goes from {before:+.3f} nats (first {tenth} steps) to {after:+.3f} (last {tenth}): "
        f"{after - before:+.3f} ± {error:.3f}. The top-K after the search is {'better' if moved < 0 else 'worse'} than "
        f"the top-K of its start by {abs(moved):.4f} nats (perplexity {policy['perplexity']:.4g} against "
        f"{start['perplexity']:.4g})."
    )


def _against_paper(keep: float, here: Mapping[str, Record]) -> Iterator[str]:
    if keep == 0.5 and POLICY in here and "wanda" in here:
        ours, wanda_row = here[POLICY]["perplexity"], here["wanda"]["perplexity"]
        verdict = "So it is here" if ours < wanda_row else "Not so here"
        yield (
            f"The paper has CAP ahead of Wanda at one half (LLaMA-3-8B: 10.35 against 12.36). {verdict}: {ours:.4g} "
            f"against {wanda_row:.4g}."
        )


def _above_dense(keep: float, here: Mapping[str, Record]) -> Iterator[str]:
    found = {name: row["over_dense"] for name, row in here.items() if row.get("over_dense")}
    if found:
        counted = ", ".join(f"{TITLES[name]} {count}" for name, count in found.items())
        yield f"Matrices that a global choice at {keep:g} gave more parameters than the dense ones have: {counted}."


@styled
def draw_perplexities(rows: Mapping[str, Record], path: Path) -> None:
    """Draw perplexity by method, and the losses on the policy's way."""
    figure, axes = new_figure(1, 2, 4.4, gridspec_kw={"width_ratios": (3, 2)})
    bars, curves = axes[0]
    methods = [name for name in TITLES if any(row["method"] == name for row in rows.values())]
    for keep, marker in zip(KEPT, "os", strict=True):
        here = [
            (methods.index(row["method"]), row["perplexity"]) for row in rows.values() if row["asked"] == keep
        ]
        if here:
            bars.plot([y for _, y in here], [x for x, _ in here], marker, label=f"kept {keep:g}")
    if DENSE in rows:
        bars.axvline(rows[DENSE]["perplexity"], color="grey", linewidth=0.8, label="dense")
    bars.set_xscale("log")
    ticks = [20 * 2**step for step in range(16)]
    highest = max((row["perplexity"] for row in rows.values()), default=40.0)
    bars.set_xticks([tick for tick in ticks if tick < 2 * highest])
    bars.xaxis.set_major_formatter("{x:g}")
    bars.minorticks_off()
    bars.set_yticks(range(len(methods)), [TITLES[name] for name in methods])
    bars.invert_yaxis()
    bars.set_xlabel("perplexity")
    for row in rows.values():
        losses = row.get("losses", [])
        if losses:
            label = f"{row['method']}, kept {row['asked']:g}"
            curves.plot(range(1, len(losses) + 1), losses, linewidth=1, label=label)
    curves.set_xlabel("step of the policy")
    curves.set_ylabel("loss of sampled masks beyond the start's top-K, nats")
    for panel in (bars, curves):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    save_figure(figure, path)


@styled
def draw_allocation(rows: Mapping[str, Record], path: Path) -> None:
    """Draw the share of low rank and of sparse entries in every matrix over the layers."""
    drawn = [rows[f"{method}@{keep}"] for keep in KEPT for method in DRAWN if f"{method}@{keep}" in rows]
    figure, axes = new_figure(2, max(1, len(drawn)), 5.2, sharex=True, sharey="row")
    for column, row in enumerate(drawn):
        for part, label in enumerate(("rank · (out + in) / (out · in)", "sparse entries / (out · in)")):
            panel = axes[part][column]
            for role in ROLES:
                shares = [item[part] for item in row["allocation"].get(role, [])]
                panel.plot(range(len(shares)), shares, linewidth=1.2, label=role)
            if column == 0:
                panel.set_ylabel(label)
        axes[0][column].set_title(f"{row['method']}, {row['asked']:g}", fontsize=9)
        axes[1][column].set_xlabel("layer")
    if drawn:
        axes[0][0].legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="HF folder, hub id or .gguf file (default SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="text for perplexity (default Wikipedia prose)")
    parser.add_argument("--calibration", type=Path, help="calibration text (default other Wikipedia prose)")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=100, help="of the policy")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'wanda@*' or '*@0.5'"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    quiet_libraries()

    from rk_export.evaluation.assets import smollm2, wiki_text

    corpus = args.calibration or wiki_text("calib")
    workshop = Workshop(
        open_source(args.model or smollm2()),
        CalibrationOptions("corpus", str(corpus), args.calibration_tokens),
        replace(CapOptions(), steps=args.steps, batch_tokens=args.batch_tokens),
        EvalText(args.text or wiki_text("eval"), args.context, args.tokens),
        torch.device(args.device),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cap.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
    results |= {
        "model": Path(args.model).name if args.model else "SmolLM2-135M-Instruct",
        "text": workshop.text.path.name,
        "tokens": args.tokens,
        "context": args.context,
        "calibration": f"{args.calibration_tokens} tokens of {Path(corpus).name}",
        "cap": {name: getattr(workshop.options, name) for name in workshop.options.__dataclass_fields__},
        "versions": library_versions(),
    }
    for key, method, keep in wanted(args.rows):
        if key not in results["rows"]:
            row = {"method": method, "asked": keep} | workshop.measure(method, keep)
            logger.info("%-24s perplexity %.4g, %.0f s", key, row["perplexity"], row["seconds"])
            results["rows"][key] = row
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(results, args.out)


if __name__ == "__main__":
    main()
