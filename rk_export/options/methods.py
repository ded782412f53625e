"""What a user may ask of the published systems and of structured pruning; validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rk_export.errors import FieldError


@dataclass(frozen=True)
class PruneOptions:
    """Whole structures that go before anything else, alike in all blocks.

    Args:
        blocks: How many decoder blocks go, those that change their input least.
        ffn: Share of every MLP's neurons that stays; 1 keeps all.
        kv_groups: Key/value heads of every block that stay, each with its query heads; None keeps all.
    """

    blocks: int = 0
    ffn: float = 1.0
    kv_groups: int | None = None

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise FieldError(f"{self.blocks} blocks", where="--prune-blocks", fix="give 0 or more")
        if not 0 < self.ffn <= 1:
            raise FieldError(
                f"{self.ffn} is not a share between 0 and 1",
                where="--prune-ffn",
                fix="0.9 keeps nine tenths of the neurons",
            )
        if self.kv_groups is not None and self.kv_groups < 1:
            raise FieldError(
                f"{self.kv_groups} key/value heads", where="--prune-heads", fix="keep at least 1"
            )
        if (self.blocks, self.ffn, self.kv_groups) == (0, 1.0, None):
            raise FieldError("nothing goes", where="prune", fix="name what goes, or leave it out")


@dataclass(frozen=True)
class BaselOptions:
    """Basis selection for a target task (2405.15877); how much is kept is the rank rule's affair.

    Args:
        target: UTF-8 text file of the task.
        steps: Training steps while directions are dropped.
        tune: Steps that train the factors afterwards, ranks fixed.
        batch_tokens: Tokens of a step.
        new_basis: Rank of the new bases of every matrix.
        events: How often directions are dropped, spread evenly over the first three quarters of the steps.
        importance: What a direction is judged by: `magnitude` of its coefficient (the paper's), `gradient` for
            |coefficient x gradient|, or `second-order` for the loss' quadratic increase without it.
        bases: The directions of a matrix: `plain` singular ones (the paper's), or those of the matrix `whitened` by
            the second moment of its inputs on the task's text, which say how much each one matters there.
        learning_rate: Largest step of a tensor, relative to its root mean square.
        seed: Of the order of the text and of the new bases.
    """

    target: str
    steps: int = 200
    tune: int = 0
    batch_tokens: int = 1024
    new_basis: int = 32
    events: int = 100
    importance: Literal["magnitude", "gradient", "second-order"] = "magnitude"
    bases: Literal["plain", "whitened"] = "plain"
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        choices = ("magnitude", "gradient", "second-order")
        require_choice("importance", self.importance, choices, "--importance")
        require_choice("choice", self.bases, ("plain", "whitened"), "--bases")
        for name, least in (("steps", 1), ("tune", 0), ("batch_tokens", 1), ("new_basis", 0), ("events", 1)):
            if getattr(self, name) < least:
                raise FieldError(f"{name} {getattr(self, name)}", where="basel", fix=f"give at least {least}")
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            raise FieldError(
                f"a learning rate of {self.learning_rate}", where="basel", fix="give a number above 0"
            )


@dataclass(frozen=True)
class CapOptions:
    """Global rank and sparsity optimization (2505.03801); the budget says how much may be kept.

    Args:
        iterations: Of the alternating directions that split a matrix into low rank and sparse, for the policy.
        selector: `policy` is the paper's policy gradient over the parts of the split, `pools` an auction of the same
            parts by predicted gain per price. `auction`, ours, leaves the split aside and spends the budget on
            mixtures of rank and entries that are fitted anew. `wanda` (2306.11695) and `magnitude` keep entries only,
            as many in every row or matrix.
        steps: Updates of the policy, one forward pass each.
        learning_rate: Of the policy.
        window: Losses that the moving baseline averages.
        batch_tokens: Tokens of an update.
        seed: Of the policy's draws.
    """

    iterations: int = 10
    selector: Literal["policy", "pools", "auction", "wanda", "magnitude"] = "policy"
    steps: int = 100
    learning_rate: float = 0.05
    window: int = 5
    batch_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        choices = ("policy", "pools", "auction", "wanda", "magnitude")
        require_choice("selector", self.selector, choices, "--selector")
        for name in ("iterations", "steps", "window", "batch_tokens"):
            if getattr(self, name) < 1:
                raise FieldError(f"{name} {getattr(self, name)}", where="cap", fix="give at least 1")
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            raise FieldError(
                f"a learning rate of {self.learning_rate}", where="cap", fix="give a number above 0"
            )


def require_choice(kind: str, value: object, choices: tuple[object, ...], where: str) -> None:
    """Refuse a value that is none of some choices.

    Raises:
        FieldError: Lists them.
    """
    if value not in choices:
        *some, last = [str(choice) for choice in choices if choice is not None]
        raise FieldError(f"unknown {kind} {value!r}", where=where, fix=f"choose {', '.join(some)} or {last}")
