"""The step that replaces matrices by two thin factors (2402.16319)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.choices import require_choice
from rk_export.options.ranks import ALLOCATIONS, DEFAULT_GROUPS, GROUPS, Allocation, Budget, Gauge, RankRule
from rk_export.options.step import Stage, Step


@dataclass(frozen=True)
class Factorize(Step):
    """Low rank: matrices that read the same input become one down-projection and a factor for each (2402.16319).

    Give one of `keep`, `rank` and `energy`. Without one the recipe's budget chooses every rank, and without a budget
    nothing is factorized.

    Args:
        groups: Matrices that are factorized together: `qk`, `qkv` or `gate_up`; or single ones: `q`, `k`, `v`, `o`,
            `gate`, `up`, `down`, `conv_in`, `conv_out`. Without names it is `qk` and `gate_up`, or, under a budget,
            every matrix by itself.
        keep: Share of each group's parameters that stays, between 0 and 1.
        rank: The same rank for every group.
        energy: Share of the squared singular values that stays, between 0 and 1.
        allocation: How `keep` is spread over the groups: `uniform`, or in proportion to what a rule sees in each
            spectrum: `energy`, `gavish-donoho`, `effective-rank` or `stable-rank`.
        qk: Factorize the group qk `whole`, or `per-head` with one factor pair for each key/value head.
        form: `plain` factor pairs, or `identity`: rows of the matrix itself, and coefficients for the others.
            Without it a budget chooses, and a rank rule takes `plain`.
        gauge: Which factor carries the singular values: `orthogonal` gives them to the second factor, `balanced`
            half to each.
        rank_multiple: Ranks are rounded down to a multiple of it. Without it the matrix and its bits choose.
    """

    name: ClassVar[str] = "factorize"
    stage: ClassVar[Stage] = "decide"
    weighs_outputs: ClassVar[bool] = True

    groups: tuple[str, ...] | None = field(default=None, metadata={"listed": True})
    keep: float | None = None
    rank: int | None = None
    energy: float | None = None
    allocation: Allocation = "uniform"
    qk: Literal["whole", "per-head"] = "whole"
    form: Literal["plain", "identity"] | None = None
    gauge: Gauge = "orthogonal"
    rank_multiple: int | None = None

    def __post_init__(self) -> None:
        self._check_groups()
        given = [name for name in ("keep", "rank", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise FieldError(
                f"{' and '.join(given)} both say how much stays", where=self.name, fix="give one of them"
            )
        rule = self.rule  # it refuses a share that is none
        require_choice("allocation", self.allocation, ALLOCATIONS, "factorize.allocation")
        require_choice("choice", self.qk, ("whole", "per-head"), "factorize.qk")
        require_choice("form", self.form, ("plain", "identity", None), "factorize.form")
        require_choice("gauge", self.gauge, ("orthogonal", "balanced"), "factorize.gauge")
        if self.qk == "per-head" and "qk" not in (DEFAULT_GROUPS if self.groups is None else self.groups):
            raise FieldError("per-head needs the group qk", where="factorize.qk", fix="add qk to the groups")
        if self.qk == "per-head" and self.form == "identity":
            raise FieldError(
                "the identity form takes q and k whole",
                where="factorize.form",
                fix="choose plain, or qk: whole",
            )
        if self.allocation != "uniform" and (rule is None or rule.kind != "keep"):
            raise FieldError(
                f"{self.allocation} spreads the share that keep says",
                where="factorize.allocation",
                fix="give keep",
            )
        if self.allocation != "uniform" and self.qk == "per-head":
            raise FieldError(
                "it gives one rank to each group",
                where="factorize.allocation",
                fix="drop it, or qk: per-head",
            )
        if self.rank_multiple is not None and self.rank_multiple < 1:
            raise FieldError(
                f"{self.rank_multiple} is below 1",
                where="factorize.rank_multiple",
                fix="give 1 for no rounding",
            )

    def _check_groups(self) -> None:
        seen: dict[str, str] = {}
        for group in self.groups or ():
            if group not in GROUPS:
                raise FieldError(
                    f"unknown group {group!r}",
                    where="factorize.groups",
                    fix=f"choose from {', '.join(GROUPS)}",
                )
            for role in GROUPS[group]:
                if role in seen:
                    raise FieldError(
                        f"{role!r} stands in both {seen[role]!r} and {group!r}",
                        where="factorize.groups",
                        fix="name each matrix once",
                    )
                seen[role] = group

    @property
    def rule(self) -> RankRule | None:
        """How ranks are chosen; None leaves it to a budget."""
        for kind in ("keep", "rank", "energy"):
            if (value := getattr(self, kind)) is not None:
                return RankRule(kind, value)
        return None

    @property
    def first_set(self) -> str:
        """Name of the first field that differs from its default, or nothing; no groups are none that are named."""
        return next(
            (item.name for item in fields(self) if getattr(self, item.name) not in (item.default, ())), ""
        )

    def with_amount(self, budget: Budget) -> Factorize:
        """Return the step at another share of the groups' parameters."""
        if budget.kind != "keep":
            kind = self.rule.kind if self.rule else "keep"
            raise FieldError(
                f"the recipe already says how much stays: factorize.{kind}",
                where=budget.flag,
                fix=f"drop one of the two: --set factorize.{kind}=null",
            )
        return replace(self, keep=budget.amount, rank=None, energy=None)

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        if self.rule is None:
            return "low rank where it pays"
        return f"joint rank-k factorization of {', '.join(self.groups or DEFAULT_GROUPS)}"
