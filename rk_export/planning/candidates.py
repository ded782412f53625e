"""What may become of one site: every form, rank and format on a menu, with its price and its predicted loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.predicted_loss import Curvature, rank_losses, rounding_loss
from rk_export.plan import SitePlan
from rk_export.planning.stored_bytes import Shape, stored_shapes

Form = Literal["joint", "identity"]
Format = QuantSpec | None  # None: floats
# Price of one stored (rows, columns) matrix in a format, in the budget's unit.
Price = Callable[[int, int, Format], float]

# A factor pair is rounded twice, once on each side; either error is as large as that of the dense matrix.
_ROUNDINGS_OF_A_PAIR = 2


@dataclass(frozen=True)
class Menu:
    """What the planner may choose from.

    Args:
        formats: Formats of a dense matrix.
        unweighed: Format of a matrix without statistics, whose loss nothing predicts.
        pair_formats: Formats of a factor pair.
        forms: Forms of a factor pair.
        rank_step: Ranks are multiples of it.
        compensated: The quantizer spreads each column's error over the columns to come (2210.17323).
        kv_groups: Number of key-value heads.
        price: What a stored matrix costs.
        factorized: Groups of roles that may become factor pairs.
    """

    formats: tuple[Format, ...]
    unweighed: Format
    pair_formats: tuple[Format, ...]
    forms: tuple[Form, ...]
    rank_step: int
    compensated: bool
    kv_groups: int
    price: Price
    factorized: frozenset[tuple[str, ...]]


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
    site: SitePlan, W: Tensor, shapes: Sequence[Shape], curvature: Curvature | None, menu: Menu
) -> list[Candidate]:
    """Return what a dense site may become; without a curvature all that can be said is that it costs bytes.

    Args:
        site: The site, dense; names and members are taken from it.
        W: Its members stacked, (out, in).
        shapes: (out, in) of each member.
        curvature: Of W; None offers the menu's format for that case only, at no predicted loss.
        menu: What to choose from.
    """

    def priced(plan: SitePlan, loss: float) -> Candidate:
        matrices = stored_shapes(plan, shapes, menu.kv_groups)
        cost = sum(menu.price(rows, columns, plan.quant) for rows, columns in matrices)
        return Candidate(plan, cost, loss)

    dense = replace(site, form="dense", rank=0)
    if curvature is None:
        return [priced(replace(dense, quant=menu.unweighed), 0.0)]
    rounding = _rounding_losses(W, curvature, menu)
    result = [priced(replace(dense, quant=spec), rounding[spec]) for spec in menu.formats]
    if site.members in menu.factorized:
        result += [priced(plan, loss) for plan, loss in _pairs(site, W, curvature, menu, rounding)]
    return result


def least_price(site: SitePlan, shapes: Sequence[Shape], menu: Menu) -> float:
    """Return what the cheapest thing costs that a site may become; weights and losses do not count.

    Args:
        site: The site, dense.
        shapes: (out, in) of each member.
        menu: What to choose from.
    """
    formats = {*menu.formats, menu.unweighed}
    prices = [sum(menu.price(rows, columns, spec) for rows, columns in shapes) for spec in formats]
    if site.members in menu.factorized:
        smallest = [replace(site, form=form, rank=menu.rank_step) for form in menu.forms]
        prices += [
            sum(
                menu.price(rows, columns, spec)
                for rows, columns in stored_shapes(pair, shapes, menu.kv_groups)
            )
            for pair in smallest
            for spec in menu.pair_formats
        ]
    return min(prices)


def _rounding_losses(W: Tensor, curvature: Curvature, menu: Menu) -> dict[Format, float]:
    losses: dict[Format, float] = {None: 0.0}
    for spec in {*menu.formats, *menu.pair_formats}:
        if spec is not None:
            # Rows of int8 matrices are rounded to nearest.
            compensated = menu.compensated and spec.activations == 16
            columns = curvature.inputs.compensated if compensated else curvature.inputs.alone
            losses[spec] = rounding_loss(W, spec, curvature, columns)
    return losses


def _pairs(
    site: SitePlan, W: Tensor, curvature: Curvature, menu: Menu, rounding: dict[Format, float]
) -> Iterator[tuple[SitePlan, float]]:
    by_rank = rank_losses(W, curvature).tolist()
    rows, columns = W.shape
    largest = min(rows, columns)
    for form in menu.forms:
        top = min(largest, rows - 1) if form == "identity" else rows * columns // (rows + columns)
        for rank in range(menu.rank_step, top + 1, menu.rank_step):
            for spec in menu.pair_formats:
                plan = replace(site, form=form, rank=rank, quant=spec)
                yield plan, by_rank[rank] + _ROUNDINGS_OF_A_PAIR * rounding[spec]
