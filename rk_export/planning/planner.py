"""From a model and options to a plan: which matrices join, at which rank, in how many bits, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.device import CPU
from rk_export.errors import InputError
from rk_export.model.architecture import Projection
from rk_export.model.description import ModelDescription
from rk_export.model.pruned_description import pruned_description
from rk_export.model.shape_rules import check_shape
from rk_export.model.sites import default_multiple, dense_sites
from rk_export.options.quantization import W8A8
from rk_export.options.ranks import DEFAULT_GROUPS, GROUPS, SINGLE_GROUPS
from rk_export.options.recipe import Recipe
from rk_export.passes.base import Layer
from rk_export.passes.numerics.joint_svd import singular_values
from rk_export.passes.numerics.predicted_loss import TableCurvature
from rk_export.passes.numerics.ranks import break_even_rank, rank_of_energy, rank_of_ratio, round_rank
from rk_export.passes.weights.factorize import stacked_pairs
from rk_export.passes.weights.shapes import empty_shape
from rk_export.plan import Plan, SitePlan
from rk_export.planning.budget import EmbeddingTable, spend, too_small
from rk_export.planning.budget_units import budget_unit, is_comfortable, plain_table
from rk_export.planning.candidates import least_cost_of
from rk_export.planning.carried import carried_sites
from rk_export.planning.cost_table import CostTable
from rk_export.planning.spectral_plan import spectral_plan
from rk_export.progress import track
from rk_export.source.protocol import Source


def decide_plan(
    source: Source,
    recipe: Recipe,
    *,
    statistics: DenseStatistics | None = None,
    table: TableCurvature | None = None,
    costs: CostTable | None = None,
    device: torch.device = CPU,
) -> Plan:
    """Decide every site of a model.

    Only budgets, the energy rule and allocations read weights; the other rules need shapes alone.

    Args:
        source: The dense model.
        recipe: What was asked for.
        statistics: Of the dense model; needed for a budget, and an allocation's spectra are whitened by them.
        table: What errors of the embedding cost; needed for a budget in bytes.
        costs: Measured times; needed for a speed-up.
        device: Where spectra and predicted losses are computed.

    Raises:
        InputError: If a group matches nothing in this architecture, or the budget is too small.
    """
    recipe = with_default_groups(source, recipe)
    check_groups(source, recipe.groups or ())
    if recipe.carries:
        sites = tuple(carried_sites(source, recipe))
        return Plan(source.config.model_type, source.structure(), recipe, sites, recipe.table_quant)
    if recipe.factorize.allocation != "uniform":
        return spectral_plan(source, recipe, statistics, device)
    if recipe.budget is not None:
        return _budgeted_plan(source, recipe, statistics, table, costs, device)
    reads_weights = recipe.rank is not None and recipe.rank.kind == "energy"
    found: list[SitePlan] = []
    for layer in source.layers() if reads_weights else source.description.layers():
        found += layer_sites(layer, source.description.projections(layer.index), recipe)
    return Plan(source.config.model_type, source.structure(), recipe, tuple(found), recipe.table_quant)


def _budgeted_plan(
    source: Source,
    recipe: Recipe,
    statistics: DenseStatistics | None,
    curvature: TableCurvature | None,
    costs: CostTable | None,
    device: torch.device,
) -> Plan:
    if statistics is None:
        raise ValueError("a budget needs the statistics of the dense model")
    unit = budget_unit(source, recipe, _rank_step(source, recipe), costs)
    table = None
    if unit.tables and curvature is not None:
        table = EmbeddingTable(
            embedding_weight(source), curvature, source.description.table_count, plain_table(source)
        )
    layers = (
        (layer, dense_sites(layer, source.description.projections(layer.index), recipe))
        for layer in track(source.layers(), "predicting losses, layers", source.layer_count)
    )
    spent = spend(layers, unit, statistics, table, device)
    return Plan(
        source.config.model_type,
        source.structure(),
        recipe,
        spent.sites,
        recipe.table_quant if table is None else spent.table,
        predicted_loss=spent.predicted_loss,
    )


def check_size(source: Source, recipe: Recipe) -> None:
    """Refuse, from shapes alone, a size that no plan can meet.

    Raises:
        InputError: Lists what the smallest model consists of.
    """
    recipe = with_default_groups(source, recipe)
    unit = budget_unit(source, recipe, _rank_step(source, recipe))
    least, sites, shapes = 0.0, [], []
    for layer in source.description.layers():
        for site in dense_sites(layer, source.description.projections(layer.index), recipe):
            linears = [layer.linear(path) for path in site.paths]
            sites.append(site)
            shapes.append([(linear.out_features, linear.in_features) for linear in linears])
            least += least_cost_of(site, shapes[-1], unit.space)
    tables = [unit.space.cost(*source.description.table_shape, spec) for spec in unit.tables]
    least += source.description.table_count * min(tables)
    if least > (amount := unit.amount(sites, shapes)):
        raise too_small(unit, least, amount)


def _rank_step(source: Source, recipe: Recipe) -> int:
    width = source.config.hidden_size
    return recipe.factorize.rank_multiple or default_multiple(width, width, recipe.quant)


def embedding_weight(source: Source) -> Tensor:
    """Return the token embedding (vocabulary, dim) as the source loads it."""
    model = source.skeleton()
    source.load_rest(model)
    weight: Tensor = model.get_submodule(source.architecture.embedding).weight
    return weight


def check_groups(source: Source, groups: tuple[str, ...]) -> None:
    """Refuse groups that match nothing in a family.

    Raises:
        InputError: Lists those that do.
    """
    known = {
        item.role for layer in range(source.layer_count) for item in source.description.projections(layer)
    }
    for group in groups:
        if not known.issuperset(GROUPS[group]):
            usable = [name for name, roles in GROUPS.items() if known.issuperset(roles)]
            raise InputError(
                f"the group {group!r} matches nothing in a {source.config.model_type} model",
                where="factorize.groups",
                fix=f"choose from {', '.join(usable)}",
            )


def check_plan(source: Source, plan: Plan) -> None:
    """Refuse a plan that does not fit a model.

    Raises:
        InputError: If it was made for another structure, or an edit names a missing matrix or too large a rank.
    """
    if plan.structure != source.structure():
        raise InputError(
            f"the plan was made for another model ({plan.model_type}, structure {plan.structure})",
            where=source.name,
            fix="make one for this model with `rk-export plan`",
        )
    if (carried := [site.site for site in plan.sites if site.carried]) and not source.has_grids:
        raise InputError(
            "its codes are to be carried over, but the model's matrices are not on integer grids",
            where=carried[0],
            fix="apply the plan to the quantized checkpoint that it was made for",
        )
    description = source.description
    if plan.pruning is not None and source.pruning is None:
        description = pruned_description(description, plan.pruning)
    elif plan.pruning != source.pruning:
        raise InputError(
            "the plan keeps other blocks, neurons or heads than the model has",
            where=source.name,
            fix="apply it to the model it was made for",
        )
    check_sites(description, plan)


def check_sites(description: ModelDescription, plan: Plan) -> None:
    """Refuse a plan whose sites do not fit the shapes of a model.

    Raises:
        InputError: If an edit names a missing matrix, leaves one out, sets too large a rank or a shape that a
            layer cannot take, or asks for int8 inputs where there are no kernels for them.
    """
    _check_int8(plan)
    if beyond := [shape.layer for shape in plan.shapes if not 0 <= shape.layer < description.layer_count]:
        raise InputError(f"there is no layer {beyond[0]}", where="shapes", fix="drop its entry")
    for layer in description.layers():
        sites = plan.of_layer(layer.index)
        for site in sites:
            _check_site(layer, site)
        _check_complete(layer, sites, description.projections(layer.index))
        if shape := plan.shape_of(layer.index):
            check_shape(description, layer, shape, sites)
            smaller = empty_shape(layer, shape, sites)
            for site in sites:
                _check_site(smaller, site)


def _check_int8(plan: Plan) -> None:
    for site in plan.sites:
        if site.quant != W8A8:
            continue
        if plan.recipe.target.ep != "cpu":
            raise InputError(
                f"int8 inputs have no kernels in a graph for {plan.recipe.target.ep}",
                where=site.site,
                fix="plan weight-only quantization, or ep cpu",
            )
        if site.correction:
            raise InputError(
                "only weight-only quantization is corrected", where=site.site, fix="set its correction to 0"
            )


def _check_site(layer: Layer, site: SitePlan) -> None:
    try:
        linears = [layer.linear(path) for path in site.paths]
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"no such matrix: {error}", where=site.site, fix="make the plan anew with `rk-export plan`"
        ) from error
    rows = sum(linear.out_features for linear in linears) // (
        layer.kv_groups if site.form == "per_head" else 1
    )
    largest = min(linears[0].in_features, rows - 1 if site.form == "identity" else rows)
    if site.rank > largest:
        raise InputError(
            f"rank {site.rank} exceeds the full rank {largest}", where=site.site, fix="lower it in the plan"
        )
    if site.entries > rows * linears[0].in_features:
        raise InputError(
            f"{site.entries} sparse entries in a ({rows}, {linears[0].in_features}) matrix",
            where=site.site,
            fix="lower them in the plan",
        )


def _check_complete(layer: Layer, sites: tuple[SitePlan, ...], projections: tuple[Projection, ...]) -> None:
    planned = Counter(path for site in sites for path in site.paths)
    matrices = Counter(projection.path for projection in projections)
    if planned != matrices:
        path = min((planned - matrices) + (matrices - planned))
        raise InputError(
            f"{path!r} stands in {planned[path]} sites instead of {matrices[path]}",
            where=f"layers.{layer.index}",
            fix="name every matrix of the layer in exactly one site",
        )


def with_default_groups(source: Source, recipe: Recipe) -> Recipe:
    """Return a recipe that names its groups, as far as the family has them.

    By default a rank rule factorizes q/k and gate/up, as the paper does (2402.16319), a budget may factorize every
    matrix, each on its own, and without either nothing is factorized; nor is it where a budget of bytes leaves every
    matrix four bits.
    """
    if recipe.groups is not None:
        return recipe
    groups: tuple[str, ...] = ()
    free = recipe.factorize.form is None and is_comfortable(source, recipe)
    if recipe.rank is not None or (recipe.budget is not None and not free):
        groups = default_groups(source, single=recipe.budget is not None)
    return recipe.with_step(replace(recipe.factorize, groups=groups))


def default_groups(source: Source, *, single: bool = False) -> tuple[str, ...]:
    """Return the default groups that a family has: every matrix by itself, or q/k and gate/up."""
    layers = range(source.layer_count)
    roles = {projection.role for layer in layers for projection in source.description.projections(layer)}
    groups = SINGLE_GROUPS if single else DEFAULT_GROUPS
    return tuple(group for group in groups if roles.issuperset(GROUPS[group]))


def layer_sites(layer: Layer, projections: tuple[Projection, ...], recipe: Recipe) -> Iterator[SitePlan]:
    """Yield the sites of one layer by the rank rule: the groups asked for first, then every other matrix."""
    grouped = {GROUPS[group] for group in recipe.groups or ()}
    for site in dense_sites(layer, projections, recipe):
        yield _factorized_site(layer, site, recipe) if site.members in grouped else site


def _factorized_site(layer: Layer, site: SitePlan, recipe: Recipe) -> SitePlan:
    linears = [layer.linear(path) for path in site.paths]
    per_head = site.members == GROUPS["qk"] and recipe.factorize.qk == "per-head"
    form: Literal["joint", "per_head", "identity"] = "per_head" if per_head else "joint"
    if recipe.factorize.form == "identity":
        form = "identity"
    columns = linears[0].in_features
    rows = sum(linear.out_features for linear in linears) // (layer.kv_groups if per_head else 1)
    asked = replace(site, form=form, rank=1, correction=0)
    rank, reason = _choose_rank(layer, asked, columns, rows, recipe)
    return replace(site, reason=reason) if reason else replace(asked, rank=rank)


def _choose_rank(layer: Layer, site: SitePlan, columns: int, rows: int, recipe: Recipe) -> tuple[int, str]:
    """Return the rank, and the reason for staying dense or an empty string."""
    identity = site.form == "identity"
    rule, largest = recipe.rank, min(columns, rows - 1 if identity else rows)
    if rule is None:
        raise ValueError("nothing says how much stays of the groups")
    if rule.kind == "rank":
        rank = int(rule.value)
        if rank > largest:
            raise InputError(
                f"rank {rank} exceeds {largest}, the full rank of a ({rows}, {columns}) group",
                where="factorize.rank",
                fix=f"give a rank from 1 to {largest}",
            )
        return rank, ""
    if rule.kind == "keep":
        wanted = rank_of_ratio(rule.value, columns, rows, identity=identity)
    else:
        wanted = max(
            rank_of_energy(
                singular_values(torch.cat([linear.weight for linear in pair.values()])), rule.value
            )
            for _, pair in stacked_pairs(layer, site)
        )
    rank = round_rank(
        wanted, recipe.factorize.rank_multiple or default_multiple(columns, rows, site.quant), largest
    )
    limit = break_even_rank(columns, rows, identity=identity)
    if rank > limit:
        return (
            0,
            f"rank {rank} would cost more than the dense ({rows}, {columns}) matrix: break-even is rank {limit}",
        )
    return rank, ""
