"""One comparison of two arrays of logits, and the verdict over all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rk_export.errors import ParityError
from rk_export.report.records import ParityTier

# Largest |difference| over the largest |logit| that passes, by the float type that is computed in.
FLOAT_BOUND = {"fp32": 1e-4, "fp16": 5e-3}


def compare(
    tier: str, name: str, reference: np.ndarray, candidate: np.ndarray, *, bound: float | None, note: str = ""
) -> ParityTier:
    """Return the parity of two arrays of logits (batch, length, vocabulary)."""
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    error, scale = float(np.abs(candidate - reference).max()), float(np.abs(reference).max())
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    measured = ParityTier(
        tier=tier,
        name=name,
        max_error=error,
        scale=scale,
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        top1_agreement=float((reference.argmax(-1) == candidate.argmax(-1)).mean()),
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
    difference = np.abs(candidate.astype(np.float64) - reference).max()
    return float(difference / np.abs(reference).max()) if difference else 0.0


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
