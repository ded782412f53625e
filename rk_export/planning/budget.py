"""One budget over form, rank, bits and block of every matrix: candidates everywhere, one auction over all.

Whatever the currency (parameters, bytes or measured time), what it buys is predicted loss, so that a dense
quantized matrix wins where it should and low rank is taken only where it pays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.errors import InputError
from rk_export.passes.base import Layer
from rk_export.passes.numerics.auction import Lot, auction, least_cost
from rk_export.passes.numerics.predicted_loss import (
    Curvature,
    InputSide,
    TableCurvature,
    table_loss,
)
from rk_export.plan import SitePlan
from rk_export.planning.candidates import Candidate, Format, candidates
from rk_export.planning.currencies import Currency, in_words
from rk_export.planning.fixed_parts import in_words as parts_in_words
from rk_export.planning.stored_bytes import Shape
from rk_export.report.humanize import size


@dataclass(frozen=True)
class Table:
    """The token embedding as a bidder.

    Args:
        weight: (vocabulary, dim).
        curvature: What its errors cost.
        copies: How many tables of its kind are stored.
    """

    weight: Tensor
    curvature: TableCurvature
    copies: int


@dataclass(frozen=True)
class Bought:
    """What a budget bought.

    Args:
        sites: The plan of every site, each with its runner-up.
        table: Format of the embedding, and of an output projection of its own; None for floats or where it was
            no part of the budget.
        predicted_loss: Predicted increase of the mean loss, in nats per token.
    """

    sites: tuple[SitePlan, ...]
    table: Format
    predicted_loss: float


def spend(
    layers: Iterable[tuple[Layer, Sequence[SitePlan]]],
    currency: Currency,
    statistics: DenseStatistics,
    table: Table | None,
    device: torch.device,
) -> Bought:
    """Choose form, rank and format of every site within a budget.

    Args:
        layers: The layers with their weights, and the sites of each, dense.
        currency: What the budget is counted in and what it may buy.
        statistics: Of the dense model.
        table: The embedding, if it is bought from the same budget.
        device: Where matrices are decomposed.

    Raises:
        InputError: If even the smallest model that the menu allows exceeds the budget.
    """
    sides = InputSides(statistics, device)
    lots: list[list[Candidate]] = []
    shapes: list[list[Shape]] = []
    for layer, sites in layers:
        for site in sites:
            weights = [layer.linear(path).weight for path in site.paths]
            shapes.append([(weight.shape[0], weight.shape[1]) for weight in weights])
            curvature = sides.curvature(site)
            stacked = torch.cat(weights).to(device) if curvature else weights[0]
            lots.append(candidates(site, stacked, shapes[-1], curvature, currency.menu))
    budget = currency.amount([lot[0].plan for lot in lots], shapes)
    bidders = [_bids(lot) for lot in lots] + ([_table_bids(table, currency)] if table else [])
    if (least := least_cost(bidders)) > budget:
        raise too_small(currency, least, budget)
    choice = auction(bidders, budget)
    chosen = tuple(
        _with_runner_up(lot[taken], lot[other], currency.unit)
        for lot, taken, other in zip(lots, choice.taken, choice.runner_up, strict=False)
    )
    return Bought(chosen, currency.tables[choice.taken[-1]] if table else None, choice.loss)


def too_small(currency: Currency, least: float, budget: float) -> InputError:
    """Return the refusal of a budget.

    Args:
        currency: What the budget is counted in.
        least: What the smallest model costs, fixed parts left out.
        budget: What may be spent on it.
    """
    where = f"--{currency.budget.kind.replace('_', '-')}"
    if currency.budget.kind != "size":
        return InputError(
            f"the smallest model that can be planned takes {in_words(least, currency.unit)}, the budget leaves "
            f"{in_words(max(budget, 0), currency.unit)}",
            where=where,
            fix="give a larger budget, or let more matrices be factorized with --groups",
        )
    total = least + currency.fixed
    return InputError(
        f"{size(currency.budget.value)} are too few: the smallest model that can be planned takes {size(total)}, "
        f"of which matrices and embedding {size(least)}, {parts_in_words(currency.parts)}",
        where=where,
        fix=f"give at least {math.ceil(total / 1e4) / 100:.2f}MB, or let more matrices be factorized with --groups",
    )


class InputSides:
    """Curvatures of sites; those that read the same input share what is derived from it, layer by layer."""

    def __init__(self, statistics: DenseStatistics, device: torch.device) -> None:
        self._statistics, self._device = statistics, device
        self._known: dict[int, InputSide] = {}
        self._layer = -1

    def curvature(self, site: SitePlan) -> Curvature | None:
        """Return the curvature of a site's stacked matrix, or None where no statistics were gathered."""
        statistics = self._statistics
        places = site.matrices
        if "expert" in site.members or any(place not in statistics.gradients for place in places):
            return None
        if site.layer != self._layer:
            self._known, self._layer = {}, site.layer
        second = statistics.second[places[0]]
        if id(second) not in self._known:
            self._known[id(second)] = InputSide(
                second.to(self._device), statistics.token_peaks.get(places[0], 0.0)
            )
        gradients = [statistics.gradients[place].to(self._device) for place in places]
        outputs = tuple(gradient * statistics.tokens for gradient in gradients)
        return Curvature(self._known[id(second)], outputs)


def _bids(lot: Sequence[Candidate]) -> Lot:
    return Lot(np.array([item.cost for item in lot]), np.array([item.loss for item in lot]))


def _table_bids(table: Table, currency: Currency) -> Lot:
    rows, columns = table.weight.shape
    inputs = InputSide(table.curvature.inputs)
    weights = inputs.compensated if currency.menu.compensated else inputs.alone
    return Lot(
        np.array([table.copies * currency.menu.price(rows, columns, spec) for spec in currency.tables]),
        np.array(
            [
                0.0 if spec is None else table_loss(table.weight, spec, table.curvature, weights)
                for spec in currency.tables
            ]
        ),
    )


def _with_runner_up(taken: Candidate, other: Candidate, unit: str) -> SitePlan:
    """Return the plan of a site that says what else was there."""
    if other is taken:
        return taken.plan
    cost, loss = other.cost - taken.cost, other.loss - taken.loss
    more = f"{in_words(abs(cost), unit)} {'more' if cost > 0 else 'less'}"
    return replace(taken.plan, runner_up=f"{other.title}: {more}, {loss:+.2g} nats")
