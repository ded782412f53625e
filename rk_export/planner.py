"""From a model and options to a plan: which matrices join, at which rank, in how many bits, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from transformers import PretrainedConfig

from rk_export.architectures import Projection, architecture_of, empty_canonical_model
from rk_export.errors import InputError
from rk_export.load import ModelSource
from rk_export.options import DEFAULT_GROUPS, GROUPS, CompressOptions, QuantSpec
from rk_export.passes.base import Layer
from rk_export.passes.numerics.joint_svd import singular_values
from rk_export.passes.numerics.ranks import break_even_rank, rank_of_energy, rank_of_ratio, round_rank
from rk_export.passes.weights.joint_rank import stacked_pairs
from rk_export.plan import Plan, SitePlan

# Hidden sizes below this count as small models, whose ranks are rounded in finer steps.
SMALL_HIDDEN_SIZE = 2048


def make_plan(source: ModelSource, options: CompressOptions) -> Plan:
    """Decide every site of a model.

    Only the energy rule reads weights; the other rules need shapes alone.

    Raises:
        InputError: If a group matches nothing in this architecture.
    """
    options = with_default_groups(source, options)
    groups = options.groups or ()
    sites: list[SitePlan] = []
    for layer in (
        loaded_layers(source) if options.rank.kind == "energy" and groups else canonical_layers(source.config)
    ):
        sites += layer_sites(layer, source.architecture.projections(source.config, layer.index), options)
    unmatched = [group for group in groups if not any(site.site.endswith(f".{group}") for site in sites)]
    if unmatched:
        known = {projection.role for projection in source.architecture.projections(source.config, 0)}
        usable = [name for name, roles in GROUPS.items() if known.issuperset(roles)]
        raise InputError(
            f"the group {unmatched[0]!r} matches nothing in a {source.config.model_type} model",
            where="--groups",
            fix=f"choose from {', '.join(usable)}",
        )
    return Plan(source.config.model_type, source.structure(), options, tuple(sites))


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
        InputError: If an edit names a missing matrix, leaves one out, or sets too large a rank.
    """
    architecture = architecture_of(config)
    for layer in canonical_layers(config):
        sites = plan.of_layer(layer.index)
        for site in sites:
            _check_site(layer, site)
        _check_complete(layer, sites, architecture.projections(config, layer.index))


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
    largest = min(linears[0].in_features, rows)
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
    """Return options that name their groups: by default q/k and gate/up, as far as the family has them."""
    if options.groups is not None:
        return options
    roles = {projection.role for projection in source.architecture.projections(source.config, 0)}
    return replace(
        options, groups=tuple(group for group in DEFAULT_GROUPS if roles.issuperset(GROUPS[group]))
    )


def layer_sites(
    layer: Layer, projections: tuple[Projection, ...], options: CompressOptions
) -> Iterator[SitePlan]:
    """Yield the sites of one layer: the groups asked for first, then every other matrix."""
    paths: dict[str, str] = {item.role: item.path for item in projections if item.role != "expert"}
    left = dict(paths)
    for group in options.groups or ():
        if all(role in paths for role in GROUPS[group]):
            members = {role: left.pop(role) for role in GROUPS[group]}
            yield _factorized_site(layer, group, members, options)
    for role, path in left.items():
        yield SitePlan(
            f"layers.{layer.index}.{role}", layer.index, (role,), (path,), "dense", 0, options.quant
        )
    experts = tuple(item.path for item in projections if item.role == "expert")
    if experts:
        roles = ("expert",) * len(experts)
        yield SitePlan(
            f"layers.{layer.index}.experts", layer.index, roles, experts, "dense", 0, options.quant
        )


def _factorized_site(layer: Layer, group: str, members: dict[str, str], options: CompressOptions) -> SitePlan:
    linears = [layer.linear(path) for path in members.values()]
    per_head = group == "qk" and options.qk == "per-head"
    columns = linears[0].in_features
    rows = sum(linear.out_features for linear in linears) // (layer.kv_groups if per_head else 1)
    form: Literal["joint", "per_head"] = "per_head" if per_head else "joint"
    site = SitePlan(
        f"layers.{layer.index}.{group}",
        layer.index,
        tuple(members),
        tuple(members.values()),
        form,
        1,
        options.quant,
    )
    rank, reason = _choose_rank(layer, site, columns, rows, options)
    return replace(site, form="dense", rank=0, reason=reason) if reason else replace(site, rank=rank)


def _choose_rank(
    layer: Layer, site: SitePlan, columns: int, rows: int, options: CompressOptions
) -> tuple[int, str]:
    """Return the rank, and the reason for staying dense or an empty string."""
    rule, largest = options.rank, min(columns, rows)
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
        wanted = rank_of_ratio(rule.value, columns, rows)
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
    limit = break_even_rank(columns, rows)
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
