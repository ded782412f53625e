"""Ranks: from a kept ratio, an energy share or a spectrum, and what a factor pair costs (2402.16319)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rk_export.report.records import Spectrum

GAVISH_DONOHO = 2.858  # median rule for unknown noise on a square matrix (1305.5870)


def kept_ratio(rank: int, in_features: int, out_features: int, *, identity: bool = False) -> float:
    """Return the parameters of a factor pair over those of the dense matrix.

    k (in + out) / (in out); in the identity form k (in + out - k) / (in out), below one for any k below both.
    """
    saved = rank * rank if identity else 0
    return (rank * (in_features + out_features) - saved) / (in_features * out_features)


def rank_of_ratio(keep: float, in_features: int, out_features: int, *, identity: bool = False) -> int:
    """Return the largest rank whose factor pair holds at most `keep` of the dense parameters.

    In the identity form at most min(in, out), the rank at which it holds as many as the dense matrix.
    """
    total, size = in_features + out_features, in_features * out_features
    if not identity:
        return math.floor(keep * size / total)
    # k (total - k) <= allowed, in integers: (total - 2k)² >= gap²
    squared_gap = total * total - 4 * math.floor(keep * size)
    gap = math.isqrt(squared_gap - 1) + 1 if squared_gap > 0 else 0
    return (total - gap) // 2


def break_even_rank(in_features: int, out_features: int, *, identity: bool = False) -> int:
    """Return the largest rank at which the factor pair is no larger than the dense matrix."""
    return rank_of_ratio(1.0, in_features, out_features, identity=identity)


def rank_of_energy(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps `energy` (0 to 1] of the squared singular values, 1 for a zero matrix."""
    share = _relative(singular_values).square().cumsum(0)
    return min(int((share < energy * share[-1]).sum()) + 1, len(singular_values))


def round_rank(rank: int, multiple: int, largest: int) -> int:
    """Round down to a multiple that the kernels like, but never below one multiple nor above `largest`."""
    return min(max(rank // multiple, 1) * multiple, largest)


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the normalized singular values (Roy and Vetterli, 2007), 0 for a zero matrix."""
    values = _relative(singular_values)
    share = values[values > 0] / values.sum()
    if not len(share):
        return 0.0
    return float(torch.exp(-(share * share.log()).sum()))


def stable_rank(singular_values: Tensor) -> float:
    """Return the squared Frobenius norm over the squared spectral norm, 0 for a zero matrix."""
    return float(_relative(singular_values).square().sum())


def _relative(singular_values: Tensor) -> Tensor:
    """Return descending values over the largest, whose squares neither overflow nor vanish; zeros stay zeros."""
    largest = singular_values[0]
    return singular_values / largest if largest > 0 else torch.zeros_like(singular_values)


def gavish_donoho_rank(singular_values: Tensor) -> int:
    """Return how many singular values exceed 2.858 times their median (at least one)."""
    return max(1, int((singular_values > GAVISH_DONOHO * singular_values.median()).sum()))


def spectrum(target: str, singular_values: Tensor, chosen_rank: int | None) -> Spectrum:
    """Return the spectral analysis of one matrix for the report.

    Args:
        target: What was decomposed.
        singular_values: All singular values, descending.
        chosen_rank: Rank of the plan, or None.
    """
    return Spectrum(
        target=target,
        singular_values=singular_values.tolist(),
        chosen_rank=chosen_rank,
        full_rank=len(singular_values),
        effective_rank=effective_rank(singular_values),
        stable_rank=stable_rank(singular_values),
        energy_rank_90=rank_of_energy(singular_values, 0.90),
        energy_rank_95=rank_of_energy(singular_values, 0.95),
        energy_rank_99=rank_of_energy(singular_values, 0.99),
        gavish_donoho_rank=gavish_donoho_rank(singular_values),
    )
