"""Spectra of all layers, and ranks shared out by them at equal parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib.figure import Figure
from measure.harness import COLORS, Measure, Row, Rows, legend, new_figure, short, styled, table
from papers.joint_rank.study import METRICS, MetricName, Part, Study, listed, paired

from rk_export import Factorize, Recipe, Run, analyze
from rk_export.passes.numerics.adaptive_ranks import DENSE, RANK_SHARES, RankShare, adaptive_ranks

SPECTRA_GROUPS = (("qk", "gate_up", "v", "o", "down"), ("q", "k", "gate", "up"))
ADAPTED = {"qk + gate/up": ("qk", "gate_up"), "qk": ("qk",)}
ADAPTED_KEEP = (0.9, 0.8)
SUMMARIES = ("full_rank", "effective_rank", "stable_rank", "gavish_donoho_rank", "energy_rank_90")


def spectra_rows(study: Study) -> Iterator[tuple[str, Measure]]:
    """Yield the spectra, the dense model, then ranks by every rule, under the metric `self` first."""
    yield "spectra", partial(_spectra_row, study)
    yield "dense", lambda: study.losses(study.model, study.protocol.short_tokens)
    for metric in reversed(METRICS):
        for name, groups in ADAPTED.items():
            for keep in ADAPTED_KEEP:
                for rule in RANK_SHARES:
                    yield (
                        f"{name}/{metric}/{keep}/{rule}",
                        partial(_adapted_row, study, groups, metric, keep, rule),
                    )


def _spectra_row(study: Study) -> Row:
    roles: dict[str, dict[str, list[float]]] = {}
    for groups in SPECTRA_GROUPS:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "report"
            recipe = Recipe((Factorize(groups, keep=0.95),))
            report = analyze(study.source.folder, out, recipe, run=Run(device="cpu"))
        for item in report.spectra:
            role = roles.setdefault(item.target.rpartition(".")[2], {name: [] for name in SUMMARIES})
            for name in SUMMARIES:
                role[name].append(round(float(getattr(item, name)), 2))
    return {"roles": roles}


def _adapted_row(
    study: Study, groups: tuple[str, ...], metric: MetricName, keep: float, rule: RankShare
) -> Row:
    ladder = study.ladder(groups, metric)
    ranks = adaptive_ranks(ladder.sites, keep, rule)
    with ladder.cut(ranks):
        losses = study.losses(study.model, study.protocol.short_tokens)
    return {
        "kept": ladder.kept(ranks),
        "stay_dense": sum(rank == DENSE for rank in ranks),
        "weighted_error": ladder.weighted_error(ranks),
        "ranks": dict(zip((pair.target for pair in ladder.pairs), ranks, strict=True)),
        **losses,
    }


def spectra_tables(rows: Rows) -> Iterator[str]:
    """Yield the spectra's summaries by role, then perplexity by rule."""
    if "spectra" in rows:
        yield "Ranks that the spectra suggest, median over layers (smallest to largest):"
        yield table(
            ["group", "full rank", "effective rank", "stable rank", "Gavish-Donoho", "90 % of the energy"],
            [
                [role, *(f"{np.median(found[n]):g} ({min(found[n]):g}–{max(found[n]):g})" for n in SUMMARIES)]
                for role, found in rows["spectra"]["roles"].items()
            ],
        )
    lines = []
    for name in ADAPTED:
        for metric in METRICS:
            for keep in ADAPTED_KEEP:
                keys = [f"{name}/{metric}/{keep}/{rule}" for rule in RANK_SHARES]
                if all(key in rows for key in keys):
                    first = rows[keys[0]]
                    cells = [name, metric, f"{keep} ({first['kept']:.4f})", short(first["perplexity"])]
                    for key in keys[1:]:
                        mean, error = paired(rows[key]["nlls"], first["nlls"])
                        cells.append(f"{short(rows[key]['perplexity'])} ({mean:+.3f} ± {error:.3f})")
                    lines.append(cells)
    if lines:
        yield (
            "Perplexity at equal kept parameters. The brackets hold the loss minus that of uniform kept ratios, in "
            "nats, with the standard error of the paired difference:"
        )
        yield table(["groups", "metric", "kept (really)", *RANK_SHARES], lines)


def spectra_reading(rows: Rows) -> Iterator[str]:
    """Say what the spectra look like, and which rules beat uniform ranks."""
    if "spectra" in rows:
        roles = rows["spectra"]["roles"]
        shares = {
            role: np.median(np.array(found["effective_rank"]) / np.array(found["full_rank"]))
            for role, found in roles.items()
        }
        cut = {
            role: np.median(np.array(found["gavish_donoho_rank"]) / np.array(found["full_rank"]))
            for role, found in roles.items()
        }
        yield (
            "Effective rank over full rank, median over layers: "
            + ", ".join(f"{role} {share:.2f}" for role, share in shares.items())
            + ". The Gavish-Donoho cut is 2.858 times the median, the coefficient of square matrices. It would keep "
            "this share: " + ", ".join(f"{role} {share:.2f}" for role, share in cut.items()) + "."
        )
    for rule in RANK_SHARES[1:]:
        better: list[str] = []
        worse: list[str] = []
        for key, row in rows.items():
            name, _, found = key.rpartition("/")
            if found == rule and f"{name}/uniform" in rows:
                mean, error = paired(row["nlls"], rows[f"{name}/uniform"]["nlls"])
                (better if mean < -2 * error else worse if mean > 2 * error else []).append(name)
        yield (
            f"{rule} against uniform: better by more than two standard errors: {listed(better)}; worse: "
            f"{listed(worse)}."
        )
    if dense := rows.get("dense"):
        yield f"Dense on these tokens: {dense['perplexity']:.3f}."


@styled
def spectra_figure(rows: Rows) -> Figure | None:
    """Draw effective ranks over the layers, and the ranks that the rules give."""
    if "spectra" not in rows:
        return None
    figure, axes = new_figure(1, 2, 3.6)
    for color, (role, found) in zip(COLORS * 2, rows["spectra"]["roles"].items(), strict=False):
        shares = np.array(found["effective_rank"]) / np.array(found["full_rank"])
        line = "-" if role in SPECTRA_GROUPS[0] else ":"
        axes[0, 0].plot(shares, line, color=color, label=role)
    axes[0, 0].set(xlabel="layer", title="effective rank / full rank")
    for metric, line in zip(METRICS, ("--", "-"), strict=True):
        for color, rule in zip(COLORS, RANK_SHARES, strict=False):
            row = rows.get(f"qk/{metric}/{ADAPTED_KEEP[0]}/{rule}")
            if row:
                ranks = [rank or math.nan for rank in row["ranks"].values()]
                axes[0, 1].plot(ranks, line, color=color, label=f"{rule}, {metric}")
    axes[0, 1].set(xlabel="layer", title=f"ranks of qk at kept {ADAPTED_KEEP[0]} (gaps: dense)")
    for panel in axes.flat:
        legend(panel, fontsize=6, ncols=2)
    return figure


PART = Part(
    "spectra",
    "Spectra, and ranks shared out by them",
    "Can the spectra of the matrices say how to spread the ranks? Each rule gives every matrix group a rank in "
    "proportion to what it reads in the group's spectrum. The spectrum is whitened under the metric `self`. One "
    "factor scales all ranks, so that all rules keep the same number of parameters. A group whose pair would be no "
    "smaller stays dense. The rule `energy` reads the rank that keeps 90 % of the squared singular values.",
    spectra_rows,
    spectra_tables,
    spectra_reading,
    spectra_figure,
)
