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
from rk_export.memory import give_back
from rk_export.passes.base import Layer
from rk_export.passes.numerics.allocation import SiteChoices, allocate, least_cost
from rk_export.passes.numerics.predicted_loss import TableCurvature, table_losses
from rk_export.plan import SitePlan
from rk_export.planning.budget_units import PLAIN_LAYERS, PLAIN_TABLES, BudgetUnit, in_words
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
        plain: Its format in plain INT4.
    """

    weight: Tensor
    curvature: TableCurvature
    copies: int
    plain: Format = PLAIN_TABLES


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
    found: list[SiteOptions] = []
    shapes: list[list[Shape]] = []
    for layer, sites in layers:
        curvatures = list(statistics.of_sites(sites, device))
        for site, curvature in zip(sites, curvatures, strict=True):
            weights = [layer.linear(path).weight for path in site.paths]
            shapes.append([(weight.shape[0], weight.shape[1]) for weight in weights])
            stacked = torch.cat(weights).to(device) if curvature else weights[0]
            offered = candidates(site, stacked, shapes[-1], curvature, unit.space)
            # The inputs of a layer live as long as its curvatures: within it the address tells them apart.
            reads = None if curvature is None else id(curvature.inputs)
            found.append(SiteOptions(site, tuple(stacked.shape), reads, offered))
        give_back()
    groups = packed_together(found) if unit.packs else [[index] for index in range(len(found))]
    choices = [_choices([found[index] for index in group]) for group in groups]
    choices += [_table_choices(table, unit)] if table else []
    budget = unit.amount([options.site for options in found], shapes)
    if (least := least_cost(choices)) > budget:
        raise too_small(unit, least, budget)
    allocated = allocate(choices, budget, _plain_start([found[group[0]] for group in groups], unit, table))
    chosen = {
        index: _with_runner_up(found[index].offered[taken], found[index].offered[other], unit.name)
        for group, taken, other in zip(groups, allocated.taken, allocated.runner_up, strict=False)
        for index in group
    }
    sites_taken = tuple(chosen[index] for index in range(len(found)))
    return BudgetResult(sites_taken, unit.tables[allocated.taken[-1]] if table else None, allocated.loss)


@dataclass(frozen=True)
class SiteOptions:
    """A site with all that may become of it.

    Args:
        site: The site, dense.
        shape: (out, in) of its members, stacked.
        reads: What it reads, by a number that is the same for sites of the layer that read the same; None where
            nothing is known about it.
        offered: What it may become.
    """

    site: SitePlan
    shape: tuple[int, ...]
    reads: int | None
    offered: list[Candidate]


def packed_together(found: Sequence[SiteOptions]) -> list[list[int]]:
    """Return the sites that take one format, by their numbers: equal shapes, inputs and choices.

    The graph then computes them in one product, which is faster: keys with values, gates with ups. Sites that may
    become factor pairs are on their own.
    """
    groups: dict[object, list[int]] = {}
    for index, options in enumerate(found):
        alone = options.reads is None or any(item.plan.form != "dense" for item in options.offered)
        formats = tuple(item.plan.quant for item in options.offered)
        key = index if alone else (options.site.layer, options.reads, options.shape, formats)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


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


def _choices(group: Sequence[SiteOptions]) -> SiteChoices:
    """Return the choices of sites that take the same one of their candidates."""
    return SiteChoices(
        np.sum([[item.cost for item in options.offered] for options in group], axis=0),
        np.sum([[item.loss for item in options.offered] for options in group], axis=0),
    )


def _plain_start(
    options: Sequence[SiteOptions], unit: BudgetUnit, table: EmbeddingTable | None
) -> list[int] | None:
    """Return the candidates that plain INT4 takes, or None where they are not on offer."""
    start = []
    for site in options:
        dense = [item.plan.quant if item.plan.form == "dense" else None for item in site.offered]
        if PLAIN_LAYERS not in dense and len(dense) > 1:
            return None
        start.append(0 if len(dense) == 1 else dense.index(PLAIN_LAYERS))
    if table is not None and table.plain not in unit.tables:
        return None
    return [*start, unit.tables.index(table.plain)] if table is not None else start


def _table_choices(table: EmbeddingTable, unit: BudgetUnit) -> SiteChoices:
    rows, columns = table.weight.shape
    weights = table.curvature.head.inputs.column_weights(compensated=unit.space.compensated)
    specs = [spec for spec in unit.tables if spec is not None]
    losses: dict[Format, float] = {None: 0.0}
    losses.update(table_losses(table.weight, specs, table.curvature, weights).items())
    return SiteChoices(
        np.array([table.copies * unit.space.cost(rows, columns, spec) for spec in unit.tables]),
        np.array([losses[spec] for spec in unit.tables]),
    )


def _with_runner_up(taken: Candidate, other: Candidate, unit: str) -> SitePlan:
    """Return the plan of a site that says what else was there."""
    if other is taken:
        return taken.plan
    cost, loss = other.cost - taken.cost, other.loss - taken.loss
    more = f"{in_words(abs(cost), unit)} {'more' if cost > 0 else 'less'}"
    return replace(taken.plan, runner_up=f"{other.title}: {more}, {loss:+.2g} nats")
