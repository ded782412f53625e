"""Which matrices are factorized together, at which rank, and what the whole model may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rk_export.errors import FieldError

# Matrices that may be factorized together: they read the same input. A group of one is the paper's
# "separate" baseline.
GROUPS: dict[str, tuple[str, ...]] = {
    "qk": ("q", "k"),
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    **{role: (role,) for role in ("q", "k", "v", "o", "gate", "up", "down")},
}

DEFAULT_GROUPS = ("qk", "gate_up")
SINGLE_GROUPS = ("q", "k", "v", "o", "gate", "up", "down")

Gauge = Literal["orthogonal", "balanced"]
# How a kept share is spread over the matrices by their spectra alone.
Allocation = Literal["uniform", "energy", "gavish-donoho", "effective-rank", "stable-rank"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


@dataclass(frozen=True)
class RankRule:
    """How a rank is chosen: a kept ratio of the parameters, an explicit rank, or a share of the energy."""

    kind: Literal["keep", "rank", "energy"]
    value: float

    def __post_init__(self) -> None:
        where = f"--{self.kind}"
        if self.kind not in ("keep", "rank", "energy"):
            raise FieldError(
                f"unknown rank rule {self.kind!r}", where="rank", fix="choose keep, rank or energy"
            )
        if self.kind == "rank":
            if not math.isfinite(self.value) or self.value < 1 or self.value != int(self.value):
                raise FieldError(
                    f"{self.value} is not a rank", where=where, fix="give a whole number of at least 1"
                )
        elif not 0 < self.value < 1:
            raise FieldError(
                f"{self.value} is not a share between 0 and 1", where=where, fix="0.9 keeps nine tenths"
            )


@dataclass(frozen=True)
class Budget:
    """What the whole model may cost; the planner spends it on rank, bits, blocks and correction together.

    Args:
        kind: `keep` is a share of the parameters of the matrices in `groups`, `size` the bytes of the model's
            files, `bits` the mean bits of a linear layer's parameter, scales included, `speed_up` the time of
            the dense float graph over that of the compressed one.
        value: The amount.
        phase: What `speed_up` counts: `prefill` or `decode`.
    """

    kind: Literal["keep", "size", "bits", "speed_up"]
    value: float
    phase: Literal["prefill", "decode"] = "decode"

    def __post_init__(self) -> None:
        where = f"--{self.kind.replace('_', '-')}"
        if self.kind == "keep" and not 0 < self.value < 1:
            raise FieldError(
                f"{self.value} is not a share between 0 and 1", where=where, fix="0.9 keeps nine tenths"
            )
        if not math.isfinite(self.value) or self.value <= 0:
            raise FieldError(f"{self.value} is no budget", where=where, fix="give a number above 0")
        if self.kind == "bits" and not 2 <= self.value <= 16:
            raise FieldError(f"{self.value} bits", where=where, fix="give a mean between 2 and 16")
        if self.kind == "speed_up" and self.value <= 1:
            raise FieldError(f"{self.value} is no speed-up", where=where, fix="give a factor above 1")
        if self.phase not in ("prefill", "decode"):
            raise FieldError(f"unknown phase {self.phase!r}", where="--phase", fix="choose prefill or decode")
