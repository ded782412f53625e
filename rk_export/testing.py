"""Parity as an assertion, for the tests of those who use a bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rk_export.commands.verify import verify
from rk_export.errors import InputError
from rk_export.options.run import Run
from rk_export.report.records import TIERS, ParityTier
from rk_export.report.render import parity_text
from rk_export.runtime.providers import Provider

# Large by intent or by chance, so that no bound fits every bundle.
INFORMATIONAL = {
    "a": "the error of the compression itself",
    "b": "the error of the compression itself",
    "h": "what left padding changes in int8 inputs",
}
NEED_THE_MODEL = "0pabc"


def assert_parity(
    bundle: str | Path,
    model: str | Path | None = None,
    *,
    tier: Sequence[str] | None = None,
    bound: float | None = None,
    provider: Provider = "cpu",
    run: Run | None = None,
) -> tuple[ParityTier, ...]:
    """Fail a test unless a bundle computes what it should.

    Args:
        bundle: The bundle folder.
        model: The dense model it was made from: HF folder, hub id or GGUF file. Tiers 0 to c need it.
        tier: Letters, as `"c"`, `"cg"` or `["c", "g"]`; None takes every tier that has a bound.
        bound: Largest error relative to the largest logit (for tier g: the share of greedy tokens that may
            differ), instead of each tier's own. Tiers a and b have none, so they need it.
        provider: Execution provider.
        run: The machine; its `texts` may hold the calibration text.

    Returns:
        The tiers that were asked for, in their order.

    Raises:
        AssertionError: A tier is out of its bound; the message shows the table.
        InputError: The bundle or the model cannot be used, or a tier is unknown or cannot be judged.
    """
    __tracebackhide__ = True
    wanted = _wanted_tiers(tier)
    _check_answerable(wanted, has_model=model is not None, bound=bound)
    measured = verify(bundle, model, provider=provider, run=run)
    tiers = tuple(_judged(item, bound) for item in _choose(measured, wanted, str(bundle)))
    if failed := [item.tier for item in tiers if not item.passed]:
        raise AssertionError(f"{bundle}: out of bound on tier {', '.join(failed)}\n{parity_text(tiers)}")
    return tiers


def _wanted_tiers(tier: Sequence[str] | None) -> tuple[str, ...] | None:
    if tier is None:
        return None
    wanted = tuple(tier)
    if unknown := [letter for letter in wanted if letter not in tuple(TIERS)]:
        raise InputError(f"unknown tier {unknown[0]!r}", where="tier", fix=f"choose from {', '.join(TIERS)}")
    if not wanted:
        raise InputError("no tier is named", where="tier", fix="name one, or give None for all with a bound")
    return wanted


def _check_answerable(wanted: tuple[str, ...] | None, *, has_model: bool, bound: float | None) -> None:
    """Refuse, before anything runs, what could not be judged."""
    if bound is not None and not (math.isfinite(bound) and bound >= 0):
        raise InputError(f"{bound} is no bound", where="bound", fix="give a number of at least 0")
    for letter in wanted or ():
        if letter in INFORMATIONAL and bound is None:
            raise InputError(
                f"tier {letter} is {INFORMATIONAL[letter]} and has no bound",
                where="tier",
                fix="say how much is acceptable: bound=0.2 allows a fifth of the largest logit",
            )
        if letter in NEED_THE_MODEL and not has_model:
            raise InputError(
                f"tier {letter} compares with PyTorch", where="model", fix="give the dense model too"
            )


def _choose(
    measured: tuple[ParityTier, ...], wanted: tuple[str, ...] | None, bundle: str
) -> list[ParityTier]:
    if wanted is None:
        return [item for item in measured if item.bound is not None]
    found = {item.tier for item in measured}
    if absent := [letter for letter in wanted if letter not in found]:
        raise InputError(
            f"tier {absent[0]} is not defined for this bundle",
            where=bundle,
            fix=f"choose from {', '.join(sorted(found))}",
        )
    return [item for item in measured if item.tier in wanted]


def _judged(tier: ParityTier, bound: float | None) -> ParityTier:
    if tier.max_error is None or tier.scale is None:
        raise InputError(f"tier {tier.tier} was {tier.note}", where="tier", fix="choose another tier")
    if bound is None:
        return tier
    return replace(tier, bound=bound, passed=tier.max_error <= bound * tier.scale)
