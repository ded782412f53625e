"""What may become of one site: every form, rank and format of a search space, with its cost and predicted loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.predicted_loss import rank_losses, rounding_losses
from rk_export.plan import SitePlan
from rk_export.planning.stored_bytes import Format, Shape, stored_shapes

Form = Literal["joint", "identity"]
# Cost of one stored (rows, columns) matrix in a format, in the budget's unit.
Cost = Callable[[int, int, Format], float]

# A factor pair is rounded twice, once on each side; either error is as large as that of the dense matrix.
_ROUNDINGS_OF_A_PAIR = 2


@dataclass(frozen=True)
class SearchSpace:
    """What the planner may choose from.

    Args:
        formats: Formats of a dense matrix whose format is open.
        pair_formats: Formats of a factor pair of such matrices.
        forms: Forms of a factor pair.
        rank_step: Ranks are multiples of it.
        compensated: The quantizer spreads each column's error over the columns to come (2210.17323).
        kv_groups: Number of key-value heads.
        cost: What a stored matrix costs.
        factorized: Groups of roles that may become factor pairs.
        is_open: Whether the format of a site is open; otherwise it stays as the site has it.
    """

    formats: tuple[Format, ...]
    pair_formats: tuple[Format, ...]
    forms: tuple[Form, ...]
    rank_step: int
    compensated: bool
    kv_groups: int
    cost: Cost
    factorized: frozenset[tuple[str, ...]]
    is_open: Callable[[SitePlan], bool]

    def at(self, site: SitePlan) -> SearchSpace:
        """Return what may be chosen from for one site."""
        return (
            self if self.is_open(site) else replace(self, formats=(site.quant,), pair_formats=(site.quant,))
        )


@dataclass(frozen=True)
class Candidate:
    """One thing a site may become.

    Args:
        plan: The site's plan.
        cost: In the budget's unit.
        loss: Predicted increase of the mean loss in nats per token.
    """

    plan: SitePlan
    cost: float
    loss: float

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        rank = "" if self.plan.form == "dense" else f"{self.plan.form} rank {self.plan.rank}, "
        return rank + format_title(self.plan.quant)


def format_title(spec: Format) -> str:
    """Return a format in a few words."""
    if spec is None:
        return "floats"
    if spec.activations == 8:
        return "W8A8"
    return f"INT{spec.bits} block {spec.block_size}" + ("" if spec.symmetric else " asymmetric")


def candidates(
    site: SitePlan, W: Tensor, shapes: Sequence[Shape], curvature: Curvature | None, space: SearchSpace
) -> list[Candidate]:
    """Return what a dense site may become; without a curvature all that can be said is that it costs bytes.

    Args:
        site: The site, dense; names and members are taken from it.
        W: Its members stacked, (out, in).
        shapes: (out, in) of each member.
        curvature: Of W; None offers the site's own format only, at no predicted loss.
        space: What to choose from.
    """

    def costed(plan: SitePlan, loss: float) -> Candidate:
        matrices = stored_shapes(plan, shapes, space.kv_groups)
        cost = sum(space.cost(rows, columns, plan.quant) for rows, columns in matrices)
        return Candidate(plan, cost, loss)

    dense = replace(site, form="dense", rank=0)
    if curvature is None:
        return [costed(dense, 0.0)]
    space = space.at(site)
    rounding = _rounding_losses(W, curvature, space)
    result = [costed(replace(dense, quant=spec), rounding[spec]) for spec in space.formats]
    if site.members in space.factorized:
        result += [costed(plan, loss) for plan, loss in _pairs(site, W, curvature, space, rounding)]
    return result


def least_cost_of(site: SitePlan, shapes: Sequence[Shape], space: SearchSpace) -> float:
    """Return what the cheapest thing costs that a site may become; weights and losses do not count.

    Args:
        site: The site, dense.
        shapes: (out, in) of each member.
        space: What to choose from.
    """
    space = space.at(site)
    formats = {*space.formats, site.quant}
    costs = [sum(space.cost(rows, columns, spec) for rows, columns in shapes) for spec in formats]
    if site.members in space.factorized:
        smallest = [replace(site, form=form, rank=space.rank_step) for form in space.forms]
        costs += [
            sum(
                space.cost(rows, columns, spec)
                for rows, columns in stored_shapes(pair, shapes, space.kv_groups)
            )
            for pair in smallest
            for spec in space.pair_formats
        ]
    return min(costs)


def _rounding_losses(W: Tensor, curvature: Curvature, space: SearchSpace) -> dict[Format, float]:
    formats = space.formats
    if space.factorized:
        formats += space.pair_formats
    # Rows of int8 matrices are rounded to nearest.
    columns = {
        spec: curvature.inputs.column_weights(compensated=space.compensated and spec.activations == 16)
        for spec in formats
        if spec is not None
    }
    losses: dict[Format, float] = {None: 0.0}
    losses.update(rounding_losses(W, columns, curvature).items())
    return losses


def _pairs(
    site: SitePlan, W: Tensor, curvature: Curvature, space: SearchSpace, rounding: dict[Format, float]
) -> Iterator[tuple[SitePlan, float]]:
    by_rank = rank_losses(W, curvature).tolist()
    rows, columns = W.shape
    largest = min(rows, columns)
    for form in space.forms:
        top = min(largest, rows - 1) if form == "identity" else rows * columns // (rows + columns)
        for rank in range(space.rank_step, top + 1, space.rank_step):
            for spec in space.pair_formats:
                plan = replace(site, form=form, rank=rank, quant=spec)
                yield plan, by_rank[rank] + _ROUNDINGS_OF_A_PAIR * rounding[spec]
