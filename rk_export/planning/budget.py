"""One budget over form, rank, bits and block of every matrix: candidates everywhere, one allocation over all.

Whatever the unit (parameters, bytes or measured time), it is spent where it lowers the predicted loss most, so that
a dense quantized matrix wins where it should and low rank is taken only where it pays.
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
from rk_export.passes.numerics.allocation import SiteChoices, allocate, least_cost
from rk_export.passes.numerics.predicted_loss import TableCurvature, table_loss
from rk_export.plan import SitePlan
from rk_export.planning.budget_units import BudgetUnit, in_words
from rk_export.planning.candidates import Candidate, candidates
from rk_export.planning.fixed_parts import in_words as parts_in_words
from rk_export.planning.stored_bytes import Format, Shape
from rk_export.report.humanize import size


@dataclass(frozen=True)
class EmbeddingTable:
    """The token embedding, where its format shares the budget.

    Args:
        weight: (vocabulary, dim).
        curvature: What its errors cost.
        copies: How many tables of its kind are stored.
    """

    weight: Tensor
    curvature: TableCurvature
    copies: int


@dataclass(frozen=True)
class BudgetResult:
    """What a budget is spent on.

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
    unit: BudgetUnit,
    statistics: DenseStatistics,
    table: EmbeddingTable | None,
    device: torch.device,
) -> BudgetResult:
    """Choose form, rank and format of every site within a budget.

    Args:
        layers: The layers with their weights, and the sites of each, dense.
        unit: What the budget is counted in, and the search space.
        statistics: Of the dense model.
        table: The embedding, if it shares the budget.
        device: Where matrices are decomposed.

    Raises:
        InputError: If even the smallest model that the search space allows exceeds the budget.
    """
    found: list[list[Candidate]] = []
    shapes: list[list[Shape]] = []
    for layer, sites in layers:
        for site, curvature in zip(sites, statistics.of_sites(sites, device), strict=True):
            weights = [layer.linear(path).weight for path in site.paths]
            shapes.append([(weight.shape[0], weight.shape[1]) for weight in weights])
            stacked = torch.cat(weights).to(device) if curvature else weights[0]
            found.append(candidates(site, stacked, shapes[-1], curvature, unit.space))
    budget = unit.amount([options[0].plan for options in found], shapes)
    choices = [_choices(options) for options in found] + ([_table_choices(table, unit)] if table else [])
    if (least := least_cost(choices)) > budget:
        raise too_small(unit, least, budget)
    allocated = allocate(choices, budget)
    chosen = tuple(
        _with_runner_up(options[taken], options[other], unit.name)
        for options, taken, other in zip(found, allocated.taken, allocated.runner_up, strict=False)
    )
    return BudgetResult(chosen, unit.tables[allocated.taken[-1]] if table else None, allocated.loss)


def too_small(unit: BudgetUnit, least: float, budget: float) -> InputError:
    """Return the refusal of a budget.

    Args:
        unit: What the budget is counted in.
        least: What the smallest model costs, fixed parts left out.
        budget: What may be spent on it.
    """
    where = unit.budget.flag
    if unit.budget.kind != "size":
        return InputError(
            f"the smallest model that can be planned takes {in_words(least, unit.name)}, the budget leaves "
            f"{in_words(max(budget, 0), unit.name)}",
            where=where,
            fix="give a larger budget, or let more matrices be factorized (factorize.groups)",
        )
    total = least + unit.fixed
    return InputError(
        f"{size(unit.budget.amount)} are too few: the smallest model that can be planned takes {size(total)}, "
        f"of which matrices and embedding {size(least)}, {parts_in_words(unit.parts)}",
        where=where,
        fix=f"give at least {math.ceil(total / 1e4) / 100:.2f}MB, or let more matrices be factorized",
    )


def _choices(options: Sequence[Candidate]) -> SiteChoices:
    return SiteChoices(np.array([item.cost for item in options]), np.array([item.loss for item in options]))


def _table_choices(table: EmbeddingTable, unit: BudgetUnit) -> SiteChoices:
    rows, columns = table.weight.shape
    weights = table.curvature.head.inputs.column_weights(compensated=unit.space.compensated)
    return SiteChoices(
        np.array([table.copies * unit.space.cost(rows, columns, spec) for spec in unit.tables]),
        np.array(
            [
                0.0 if spec is None else table_loss(table.weight, spec, table.curvature, weights)
                for spec in unit.tables
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
