"""From a model and options to a plan: which matrices join, at which rank, in how many bits, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rk_export.architectures import Projection, architecture_of, empty_canonical_model
from rk_export.budget import Table, spend
from rk_export.cost_table import TIMED_CONTEXT, CostTable
from rk_export.currencies import currency_of, table_count
from rk_export.dense_statistics import DenseStatistics
from rk_export.device import resolve_device
from rk_export.errors import InputError
from rk_export.load import ModelSource
from rk_export.options import DEFAULT_GROUPS, GROUPS, SINGLE_GROUPS, W8A8, CompressOptions, QuantSpec
from rk_export.passes.base import Layer
from rk_export.passes.numerics.joint_svd import singular_values
from rk_export.passes.numerics.predicted_loss import TableCurvature
from rk_export.passes.numerics.ranks import break_even_rank, rank_of_energy, rank_of_ratio, round_rank
from rk_export.passes.weights.joint_rank import stacked_pairs
from rk_export.passes.weights.shapes import empty_shape
from rk_export.plan import Plan, SitePlan
from rk_export.shape_rules import check_shape

# Hidden sizes below this count as small models, whose ranks are rounded in finer steps.
SMALL_HIDDEN_SIZE = 2048


def make_plan(
    source: ModelSource,
    options: CompressOptions,
    *,
    statistics: DenseStatistics | None = None,
    table: TableCurvature | None = None,
    costs: CostTable | None = None,
) -> Plan:
    """Decide every site of a model.

    Only budgets and the energy rule read weights; the other rules need shapes alone.

    Args:
        source: The dense model.
        options: What was asked for.
        statistics: Of the dense model; needed for a budget.
        table: What errors of the embedding cost; needed for a budget in bytes.
        costs: Measured times; needed for a speed-up.

    Raises:
        InputError: If a group matches nothing in this architecture, or the budget is too small.
    """
    options = with_default_groups(source, options)
    _check_groups(source, options.groups or ())
    if options.budget is not None:
        return _budgeted_plan(source, options, statistics, table, costs)
    reads_weights = options.rank_rule.kind == "energy" and options.groups
    sites: list[SitePlan] = []
    for layer in loaded_layers(source) if reads_weights else canonical_layers(source.config):
        sites += layer_sites(layer, source.architecture.projections(source.config, layer.index), options)
    return Plan(source.config.model_type, source.structure(), options, tuple(sites))


def check_options(source: ModelSource, options: CompressOptions) -> None:
    """Refuse, before any work, options that do not go with a model or with each other.

    Raises:
        InputError: If a group matches nothing, or a budget or a quantizer lacks the statistics that it needs.
    """
    options = with_default_groups(source, options)
    _check_groups(source, options.groups or ())
    if options.budget is not None and source.architecture.is_encoder:
        raise InputError(
            "an encoder has no loss that a budget could be planned by",
            where=f"--{options.budget.kind.replace('_', '-')}",
            fix="give --uniform, which keeps the same share of every group",
        )
    if options.budget is not None and not options.calibration.uses_text:
        raise InputError(
            f"a budget needs statistics, which the metric {options.calibration.metric} does not gather",
            where="--metric",
            fix="choose self or corpus:FILE, or give --uniform",
        )
    if options.budget is not None and options.budget.kind == "speed_up" and options.ep != "cpu":
        raise InputError(
            f"products are timed on the CPU provider, the graph is made for {options.ep}",
            where="--speed-up",
            fix="use --ep cpu, or a budget of --size or --keep",
        )
    if options.budget is not None and options.budget.kind == "speed_up":
        context = int(source.config.max_position_embeddings)
        if context < TIMED_CONTEXT:
            raise InputError(
                f"the model's context of {context} tokens is shorter than the {TIMED_CONTEXT} that are timed",
                where="--speed-up",
                fix="choose another budget",
            )
    if options.heal and (source.architecture.is_encoder or not options.calibration.uses_text):
        raise InputError(
            "recovery trains a decoder on text", where="--heal", fix="choose --metric self or corpus:FILE"
        )


def _budgeted_plan(
    source: ModelSource,
    options: CompressOptions,
    statistics: DenseStatistics | None,
    curvature: TableCurvature | None,
    costs: CostTable | None,
) -> Plan:
    if statistics is None:
        raise ValueError("a budget needs the statistics of the dense model")
    width = source.config.hidden_size
    step = options.rank_multiple or default_multiple(width, width, options.quant)
    currency = currency_of(source, options, step, costs)
    table = None
    if currency.tables and curvature is not None:
        table = Table(embedding_weight(source), curvature, table_count(source))
    architecture = source.architecture
    layers = (
        (layer, dense_sites(layer, architecture.projections(source.config, layer.index), options))
        for layer in loaded_layers(source)
    )
    bought = spend(layers, currency, statistics, table, resolve_device(options.device))
    if table is not None:
        options = replace(options, embedding_quant=bought.table)
    return Plan(
        source.config.model_type,
        source.structure(),
        options,
        bought.sites,
        predicted_loss=bought.predicted_loss,
    )


def embedding_weight(source: ModelSource) -> Tensor:
    """Return the token embedding (vocabulary, dim) as the source loads it."""
    model = source.skeleton()
    source.load_rest(model)
    weight: Tensor = model.get_submodule(source.architecture.embedding).weight
    return weight


def _check_groups(source: ModelSource, groups: tuple[str, ...]) -> None:
    known = {
        item.role
        for layer in range(source.layer_count)
        for item in source.architecture.projections(source.config, layer)
    }
    for group in groups:
        if not known.issuperset(GROUPS[group]):
            usable = [name for name, roles in GROUPS.items() if known.issuperset(roles)]
            raise InputError(
                f"the group {group!r} matches nothing in a {source.config.model_type} model",
                where="--groups",
                fix=f"choose from {', '.join(usable)}",
            )


def loaded_layers(source: ModelSource) -> Iterator[Layer]:
    """Yield the layers with their weights, one at a time in memory."""
    model = source.skeleton()
    kv_groups = source.architecture.heads(source.config).kv_heads
    for index in range(source.layer_count):
        module = source.load_layer(model, index)
        yield Layer(index, module, kv_groups)
        module.to("meta")


def check_plan(source: ModelSource, plan: Plan) -> None:
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
    check_sites(source.config, plan)


def check_sites(config: PretrainedConfig, plan: Plan) -> None:
    """Refuse a plan whose sites do not fit the shapes of a model.

    Raises:
        InputError: If an edit names a missing matrix, leaves one out, sets too large a rank or a shape that a
            layer cannot take, or asks for int8 inputs where there are no kernels for them.
    """
    _check_int8(plan)
    if beyond := [shape.layer for shape in plan.shapes if not 0 <= shape.layer < config.num_hidden_layers]:
        raise InputError(f"there is no layer {beyond[0]}", where="shapes", fix="drop its entry")
    architecture = architecture_of(config)
    for layer in canonical_layers(config):
        sites = plan.of_layer(layer.index)
        for site in sites:
            _check_site(layer, site)
        _check_complete(layer, sites, architecture.projections(config, layer.index))
        if shape := plan.shape_of(layer.index):
            check_shape(config, layer, shape, sites)
            smaller = empty_shape(layer, shape, sites)
            for site in sites:
                _check_site(smaller, site)


def _check_int8(plan: Plan) -> None:
    for site in plan.sites:
        if site.quant != W8A8:
            continue
        if plan.options.ep != "cpu":
            raise InputError(
                f"int8 inputs have no kernels in a graph for {plan.options.ep}",
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


def canonical_layers(config: PretrainedConfig) -> Iterator[Layer]:
    """Yield the layers of a model in canonical form, shapes only."""
    architecture = architecture_of(config)
    kv_groups = architecture.heads(config).kv_heads
    model = empty_canonical_model(config)
    for index, module in enumerate(model.get_submodule(architecture.layers).children()):
        yield Layer(index, module, kv_groups)


def with_default_groups(source: ModelSource, options: CompressOptions) -> CompressOptions:
    """Return options that name their groups, as far as the family has them.

    By default a rank rule factorizes q/k and gate/up, as the paper does (2402.16319), a budget may factorize every
    matrix, each on its own, and without either nothing is factorized.
    """
    if options.groups is not None:
        return options
    if options.rank is None and options.budget is None:
        return replace(options, groups=())
    roles = {projection.role for projection in source.architecture.projections(source.config, 0)}
    groups = DEFAULT_GROUPS if options.budget is None else SINGLE_GROUPS
    return replace(options, groups=tuple(group for group in groups if roles.issuperset(GROUPS[group])))


def layer_sites(
    layer: Layer, projections: tuple[Projection, ...], options: CompressOptions
) -> Iterator[SitePlan]:
    """Yield the sites of one layer by the rank rule: the groups asked for first, then every other matrix."""
    grouped = {GROUPS[group] for group in options.groups or ()}
    for site in dense_sites(layer, projections, options):
        yield _factorized_site(layer, site, options) if site.members in grouped else site


def dense_sites(
    layer: Layer, projections: tuple[Projection, ...], options: CompressOptions
) -> list[SitePlan]:
    """Return the sites of one layer, all dense: the groups asked for first, then every other matrix."""
    paths: dict[str, str] = {item.role: item.path for item in projections if item.role != "expert"}
    left = dict(paths)
    members: dict[str, dict[str, str]] = {}
    for group in options.groups or ():
        if all(role in paths for role in GROUPS[group]):
            members[group] = {role: left.pop(role) for role in GROUPS[group]}
    members |= {role: {role: path} for role, path in left.items()}
    sites = [
        _dense_site(layer.index, name, tuple(roles), tuple(roles.values()), options)
        for name, roles in members.items()
    ]
    if experts := tuple(item.path for item in projections if item.role == "expert"):
        sites.append(_dense_site(layer.index, "experts", ("expert",) * len(experts), experts, options))
    return sites


def _dense_site(
    layer: int, name: str, members: tuple[str, ...], paths: tuple[str, ...], options: CompressOptions
) -> SitePlan:
    return SitePlan(f"layers.{layer}.{name}", layer, members, paths, "dense", 0, options.quant)


def _factorized_site(layer: Layer, site: SitePlan, options: CompressOptions) -> SitePlan:
    linears = [layer.linear(path) for path in site.paths]
    per_head = site.members == GROUPS["qk"] and options.qk == "per-head"
    form: Literal["joint", "per_head", "identity"] = "per_head" if per_head else "joint"
    if options.form == "identity":
        if per_head:
            raise InputError(
                "the identity form takes q and k whole",
                where="--form",
                fix="drop --qk per-head, or choose plain",
            )
        form = "identity"
    columns = linears[0].in_features
    rows = sum(linear.out_features for linear in linears) // (layer.kv_groups if per_head else 1)
    asked = replace(site, form=form, rank=1)
    rank, reason = _choose_rank(layer, asked, columns, rows, options)
    return replace(site, reason=reason) if reason else replace(asked, rank=rank)


def _choose_rank(
    layer: Layer, site: SitePlan, columns: int, rows: int, options: CompressOptions
) -> tuple[int, str]:
    """Return the rank, and the reason for staying dense or an empty string."""
    identity = site.form == "identity"
    rule, largest = options.rank_rule, min(columns, rows - 1 if identity else rows)
    if rule.kind == "rank":
        rank = int(rule.value)
        if rank > largest:
            raise InputError(
                f"rank {rank} exceeds {largest}, the full rank of a ({rows}, {columns}) group",
                where="--rank",
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
        wanted, options.rank_multiple or default_multiple(columns, rows, options.quant), largest
    )
    limit = break_even_rank(columns, rows, identity=identity)
    if rank > limit:
        return (
            0,
            f"rank {rank} would cost more than the dense ({rows}, {columns}) matrix: break-even is rank {limit}",
        )
    return rank, ""


def default_multiple(columns: int, rows: int, quant: QuantSpec | None) -> int:
    """Return the step that ranks are rounded to.

    Quantized, the up-projection's columns are whole blocks, and CUDA's INT4 kernel needs output sizes in
    multiples of 64; small matrices keep a finer grain.
    """
    small = min(columns, rows) < SMALL_HIDDEN_SIZE
    if quant is None:
        return 8 if small else 64
    return max(32 if small else 64, quant.block_size) if min(columns, rows) > 2 * quant.block_size else 8
