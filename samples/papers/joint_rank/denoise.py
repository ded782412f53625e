"""Does truncation recover clean weights from noisy ones? The denoising claim of 2402.16319, with its planted case."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from measure.harness import COLORS, Measure, Row, Rows, legend, new_figure, short, styled, table
from papers.joint_rank.denoising import (
    error_bound,
    gaussian_noise,
    noise_left,
    planted,
    squared_errors_by_rank,
)
from papers.joint_rank.study import METRICS, MetricName, Part, Study, listed, log_scale, paired
from torch import Tensor

from rk_export.passes.numerics.joint_svd import joint_factors
from rk_export.passes.numerics.ranks import gavish_donoho_rank

NOISES = (0.05, 0.3)
PLANTED_NOISES = (0.05, 0.3, 0.8)
DENOISE_SHARES = (0.9, 0.6)
DENOISED = ("qk", "gate_up")
PLANTED_RANK_SHARE = 9  # the planted rank is the smaller side over this


@contextmanager
def noisy(study: Study, group: str, size: float) -> Iterator[list[Tensor]]:
    """Add noise of a relative size to every matrix of a group; yield the clean stacked weights, layer by layer."""
    layers = study.linears(study.model, group)
    clean = [[linear.weight.detach().clone() for linear in linears] for linears in layers]
    try:
        for index, (linears, weights) in enumerate(zip(layers, clean, strict=True)):
            generator = torch.Generator().manual_seed(index)
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data.add_(gaussian_noise(weight, size, generator) if size else 0)
        yield [torch.cat(weights) for weights in clean]
    finally:
        for linears, weights in zip(layers, clean, strict=True):
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data.copy_(weight)


def denoise_rows(study: Study) -> Iterator[tuple[str, Measure]]:
    """Yield planted matrices, the clean model, then noise alone and noise with truncation, by group and size."""
    for size in PLANTED_NOISES:
        yield f"planted/{size}", partial(_planted_row, study, size)
    yield "clean", lambda: study.losses(study.model, study.protocol.short_tokens)
    for group in DENOISED:
        for size in NOISES:
            yield f"{group}/{size}", partial(_noise_row, study, group, size)
        for metric in METRICS:
            for size in (0.0, *NOISES):
                if size:
                    yield (
                        f"{group}/{size}/{metric}/outputs",
                        partial(_outputs_row, study, group, size, metric),
                    )
                for share in DENOISE_SHARES:
                    key = f"{group}/{size}/{metric}/{share}"
                    yield key, partial(_denoise_row, study, group, size, metric, share)


def _planted_row(study: Study, size: float) -> Row:
    rows, columns = torch.cat([linear.weight for linear in study.linears(study.model, "gate_up")[0]]).shape
    rank = min(rows, columns) // PLANTED_RANK_SHARE
    generator = torch.Generator().manual_seed(0)
    clean = planted(rows, columns, rank, generator)
    noise = gaussian_noise(clean, size, generator)
    factors = joint_factors(clean + noise, min(rows, columns))
    errors = squared_errors_by_rank(factors.up, factors.down, clean).sqrt() / float(noise.norm())
    second = study.real_inputs[0, study.paths("gate_up")[0]]
    outputs = squared_errors_by_rank(factors.up, factors.down, clean, second)
    of_noise = float(((noise @ second.double()) * noise).sum())
    cut = gavish_donoho_rank(factors.singular_values)
    return {
        "shape": [rows, columns],
        "rank": rank,
        "gavish_donoho_rank": cut,
        "best_rank": int(errors.argmin()) + 1,
        "weight_ratio": float(errors[rank - 1]),
        "weight_ratio_at_cut": float(errors[cut - 1]),
        "predicted_ratio": noise_left(rank, rows, columns),
        "bound": error_bound(rank, noise) / float(noise.norm()),
        "output_ratio": math.sqrt(float(outputs[rank - 1]) / of_noise),
    }


def _noise_row(study: Study, group: str, size: float) -> Row:
    with noisy(study, group, size):
        return study.losses(study.model, study.protocol.short_tokens)


def _denoise_row(study: Study, group: str, size: float, metric: MetricName, share: float) -> Row:
    with noisy(study, group, size):
        ladder = study.ladder((group,), metric, noise=size)
        ranks = ladder.ranks_of_share(share)
        with ladder.cut(ranks):
            losses = study.losses(study.model, study.protocol.short_tokens)
    return {"rank": ranks[0], "kept": ladder.kept(ranks), **losses}


@torch.no_grad()
def _outputs_row(study: Study, group: str, size: float, metric: MetricName) -> Row:
    """Return for each layer ‖ŷ - y*‖ / ‖y*‖ and ‖y' - y*‖ / ‖y*‖ on real inputs, and the rank that comes closest."""
    path, noise, best = study.paths(group)[0], [], []
    cut: dict[str, list[float]] = {str(share): [] for share in DENOISE_SHARES}
    with noisy(study, group, size) as clean:
        ladder = study.ladder((group,), metric, noise=size)
        for index, (pair, weight) in enumerate(zip(ladder.pairs, clean, strict=True)):
            second = study.real_inputs[index, path].double()
            power = float(((weight.double() @ second) * weight.double()).sum())
            errors = squared_errors_by_rank(pair.factors.up, pair.factors.down, weight, second)
            difference = (pair.dense - weight).double()
            noise.append(math.sqrt(float(((difference @ second) * difference).sum()) / power))
            best.append(int(errors.argmin()) + 1)
            for share in DENOISE_SHARES:
                rank = ladder.ranks_of_share(share)[index]
                cut[str(share)].append(math.sqrt(float(errors[rank - 1]) / power))
    return {"cut_output": cut, "noise_output": noise, "best_ranks": best}


def _ratios(rows: Rows, group: str, size: float, metric: str, share: float) -> list[float]:
    """Return ‖ŷ - y*‖ / ‖y' - y*‖ of each layer; empty where it is not measured."""
    row = rows.get(f"{group}/{size}/{metric}/outputs")
    if row is None:
        return []
    return [a / b for a, b in zip(row["cut_output"][str(share)], row["noise_output"], strict=True)]


def denoise_tables(rows: Rows) -> Iterator[str]:
    """Yield the planted case, then a table a group."""
    planted_rows = {size: rows[f"planted/{size}"] for size in PLANTED_NOISES if f"planted/{size}" in rows}
    if planted_rows:
        yield (
            "In the planted case, the clean matrix has a low rank, equal singular values, and the shape of gate/up. "
            "Errors are over the norm of the noise:"
        )
        yield table(
            [
                "noise",
                "rank",
                "Gavish-Donoho",
                "best rank",
                "‖Ŵ−W*‖/‖E‖",
                "predicted",
                "bound",
                "at the cut",
                "outputs",
            ],
            [
                [size, row["rank"], row["gavish_donoho_rank"], row["best_rank"]]
                + [
                    f"{row[name]:.3f}"
                    for name in (
                        "weight_ratio",
                        "predicted_ratio",
                        "bound",
                        "weight_ratio_at_cut",
                        "output_ratio",
                    )
                ]
                for size, row in planted_rows.items()
            ],
        )
    for group in DENOISED:
        lines = [
            _line(rows, group, size, metric, share)
            for size in NOISES
            for metric in METRICS
            for share in DENOISE_SHARES
            if f"{group}/{size}/{metric}/{share}" in rows
        ]
        if lines:
            yield (
                f"`{group}` of the model. There are three perplexities: with noise alone, with noise and then "
                "truncation, and with truncation alone. The ratio is ‖ŷ−y*‖/‖y'−y*‖ on real inputs, as geometric mean "
                "over layers. *Closer in* counts the layers in which truncation comes closer. *Best rank* is the rank "
                "that comes closest, as median over layers."
            )
            head = [
                "noise",
                "metric",
                "rank",
                "noise",
                "noise, cut",
                "cut",
                "ratio",
                "closer in",
                "best rank",
            ]
            yield table(head, lines)


def _line(rows: Rows, group: str, size: float, metric: str, share: float) -> list[object]:
    row, alone = rows[f"{group}/{size}/{metric}/{share}"], rows[f"{group}/{size}"]
    clean = rows.get(f"{group}/0.0/{metric}/{share}", {})
    ratios = _ratios(rows, group, size, metric, share)
    perplexities = (short(one.get("perplexity")) for one in (alone, row, clean))
    best = np.median(rows[f"{group}/{size}/{metric}/outputs"]["best_ranks"])
    closer = sum(ratio < 1 for ratio in ratios)
    outputs = (short(_geometric(ratios)), f"{closer} of {len(ratios)}", f"{best:.0f}")
    return [size, metric, row["rank"], *perplexities, *outputs]


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def denoise_reading(rows: Rows) -> Iterator[str]:
    """Say when truncation recovers something."""
    for size in PLANTED_NOISES:
        if row := rows.get(f"planted/{size}"):
            yield (
                f"Planted rank {row['rank']}, noise {size}: the Gavish-Donoho cut finds {row['gavish_donoho_rank']}. "
                f"Truncation leaves {row['weight_ratio']:.3f} of the error in the weights (predicted "
                f"{row['predicted_ratio']:.3f}, bound {row['bound']:.2f}) and {row['output_ratio']:.3f} in the outputs."
            )
    for group in DENOISED:
        for metric in METRICS:
            better, lines = [], 0
            for size in NOISES:
                for share in DENOISE_SHARES:
                    if (row := rows.get(f"{group}/{size}/{metric}/{share}")) is not None:
                        lines += 1
                        mean, error = paired(row["nlls"], rows[f"{group}/{size}"]["nlls"])
                        if mean < -2 * error:
                            better.append(
                                f"noise {size} at rank {row['rank']} ({mean:+.3f} ± {error:.3f} nats)"
                            )
            if lines:
                yield (
                    f"{group}, metric {metric}: truncating the noisy model lowers its loss by more than two standard "
                    f"errors in {len(better)} of {lines} cases: {listed(better)}."
                )
    found = {
        f"{group}, noise {size}, {metric}, {share}": _ratios(rows, group, size, metric, share)
        for group in DENOISED
        for size in NOISES
        for metric in METRICS
        for share in DENOISE_SHARES
    }
    found = {case: ratios for case, ratios in found.items() if ratios}
    most = [case for case, ratios in found.items() if 2 * sum(ratio < 1 for ratio in ratios) > len(ratios)]
    if found:
        yield (
            "Outputs: in most layers, truncation comes closer to the clean layer than the noisy weights do in "
            f"{len(most)} of {len(found)} cases (share of the full rank last): {listed(most)}."
        )


@styled
def denoise_figure(rows: Rows) -> Figure | None:
    """Draw the ratio of output errors over the layers, by group and metric, at the middle rank."""
    share = DENOISE_SHARES[0]
    if not any(key.endswith("/outputs") for key in rows):
        return None
    figure, axes = new_figure(1, len(DENOISED), 3.4, sharey=True)
    for panel, group in zip(axes.flat, DENOISED, strict=True):
        for metric, line in zip(METRICS, ("--", "-"), strict=True):
            for color, size in zip(COLORS, NOISES, strict=False):
                if ratios := _ratios(rows, group, size, metric, share):
                    panel.plot(ratios, line, color=color, label=f"noise {size}, {metric}")
        panel.axhline(1, color="#777777", linewidth=1)
        log_scale(panel)
        panel.set(xlabel="layer", title=f"{group}, {share:.0%} of full rank; below 1: recovers")
    axes[0, 0].set_ylabel("‖ŷ−y*‖ / ‖y'−y*‖")
    legend(axes[0, 0])
    return figure


PART = Part(
    "denoise",
    "Denoising: truncation of weights with added noise",
    "Does truncation bring noisy weights closer to the clean ones? W* are the model's weights, and W' = W* + E are the "
    "noisy ones. E is Gaussian, with a given share of each matrix' Frobenius norm. Ŵ is the joint truncation of W'. "
    "Outputs are compared on the text's own inputs, in every layer by itself. The metric `self` is that of the clean "
    "model. Nobody would have it in practice, so it favours truncation.",
    denoise_rows,
    denoise_tables,
    denoise_reading,
    denoise_figure,
)
