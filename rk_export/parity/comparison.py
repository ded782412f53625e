"""One comparison of two arrays of logits, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from rk_export.errors import ParityError
from rk_export.report.records import ParityTier

# Largest |difference| over the largest |logit| that passes, by the float type that is computed in.
FLOAT_BOUND = {"fp32": 1e-4, "fp16": 5e-3}

# Logits that are compared at a time.
_TOGETHER = 1 << 21


def compare(
    tier: str, name: str, reference: np.ndarray, candidate: np.ndarray, *, bound: float | None, note: str = ""
) -> ParityTier:
    """Return the parity of two arrays of logits (batch, length, vocabulary)."""
    error = scale = divergence = 0.0
    same = positions = 0
    for expected, found in _blocks(reference, candidate):
        error, scale = _larger(error, found - expected), _larger(scale, expected)
        log_p, log_q = _log_softmax(expected), _log_softmax(found)
        divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        positions += len(expected)
    measured = ParityTier(
        tier=tier,
        name=name,
        max_error=error,
        scale=scale,
        kl=divergence / positions,
        top1_agreement=same / positions,
        note=note,
    )
    return measured if bound is None else held_to(measured, bound)


def held_to(measured: ParityTier, bound: float) -> ParityTier:
    """Return a measured tier with the verdict under a bound on its relative error."""
    error, scale = measured.max_error, measured.scale
    if error is None or scale is None:
        return measured
    return replace(measured, bound=bound, passed=bool(np.isfinite(error) and error <= bound * scale))


def not_measured(tier: str, name: str, reason: str) -> ParityTier:
    """Return a tier that could not be measured, with the reason."""
    return ParityTier(tier, name, max_error=None, scale=None, note=f"not measured: {reason}")


def relative_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the largest difference over the largest value of the reference."""
    error = scale = 0.0
    for expected, found in _blocks(reference, candidate):
        error, scale = _larger(error, found - expected), _larger(scale, expected)
    return error / scale if error else 0.0


def _blocks(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield some positions of two arrays (..., width) at a time, both (positions, width) in float64."""
    width = first.shape[-1]
    one, other = first.reshape(-1, width), second.reshape(-1, width)
    rows = max(1, _TOGETHER // width)
    for begin in range(0, len(one), rows):
        rows_of = slice(begin, begin + rows)
        yield one[rows_of].astype(np.float64), other[rows_of].astype(np.float64)


def _larger(so_far: float, values: np.ndarray) -> float:
    """Return the largest absolute value; what is not a number stays so."""
    return float(np.maximum(so_far, np.abs(values).max()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def require_parity(tiers: tuple[ParityTier, ...], where: str, fix: str | None = None) -> None:
    """Raise ParityError unless every tier with a bound passed."""
    failed = [tier for tier in tiers if tier.passed is False]
    if failed:
        worst = "; ".join(
            f"tier {tier.tier} ({tier.name}): {tier.max_error:.3g} on a scale of {tier.scale:.3g}, "
            f"bound {tier.bound:.3g}"
            for tier in failed
        )
        raise ParityError(f"parity is out of its bound: {worst}", where=where, fix=fix)
