"""From a model and options to a plan: which matrices join, at which rank, in how many bits, and why not."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rk_export.architectures import Projection
from rk_export.errors import InputError
from rk_export.load import ModelSource
from rk_export.passes.base import Layer
from rk_export.passes.numerics.joint_svd import singular_values
from rk_export.passes.numerics.ranks import break_even_rank, rank_of_energy, rank_of_ratio, round_rank
from rk_export.plan import GROUPS, CompressOptions, Plan, QuantSpec, SitePlan

# Hidden sizes below this count as small models, whose ranks are rounded in finer steps.
SMALL_HIDDEN_SIZE = 2048


def make_plan(source: ModelSource, options: CompressOptions) -> Plan:
    """Decide every site of a model.

    Only the energy rule reads weights; the other rules need shapes alone.

    Raises:
        InputError: If a group matches nothing in this architecture.
    """
    model = source.skeleton()
    layers: list[Layer] = []
    sites: list[SitePlan] = []
    for index in range(source.layer_count):
        if options.rank.kind == "energy" and options.groups:
            module = source.load_layer(model, index)
        else:
            module = model.get_submodule(f"{source.architecture.layers}.{index}")
            source.architecture.canonicalize(module)
        layer = Layer(index, module, source.architecture.heads(source.config).kv_heads)
        sites += layer_sites(layer, source.architecture.projections(source.config, index), options)
        module.to("meta")
        layers.append(layer)
    unmatched = [group for group in options.groups if not any(site.site.endswith(f".{group}") for site in sites)]
    if unmatched:
        known = {projection.role for projection in source.architecture.projections(source.config, 0)}
        usable = [name for name, roles in GROUPS.items() if known.issuperset(roles)]
        raise InputError(
            f"the group {unmatched[0]!r} matches nothing in a {source.config.model_type} model",
            where="--groups",
            fix=f"choose from {', '.join(usable)}",
        )
    return Plan(source.config.model_type, source.structure(), options, tuple(sites))


def layer_sites(
    layer: Layer, projections: tuple[Projection, ...], options: CompressOptions
) -> Iterator[SitePlan]:
    """Yield the sites of one layer: the groups asked for first, then every other matrix."""
    paths = {projection.role: projection.path for projection in projections if projection.role != "expert"}
    left = dict(paths)
    for group in options.groups:
        if all(role in paths for role in GROUPS[group]):
            members = {role: left.pop(role) for role in GROUPS[group]}
            yield _factorized_site(layer, group, members, options)
    for role, path in left.items():
        yield SitePlan(f"layers.{layer.index}.{role}", layer.index, (role,), (path,), "dense", 0, options.quant)
    experts = tuple(projection.path for projection in projections if projection.role == "expert")
    if experts:
        roles = ("expert",) * len(experts)
        yield SitePlan(f"layers.{layer.index}.experts", layer.index, roles, experts, "dense", 0, options.quant)


def _factorized_site(layer: Layer, group: str, members: dict[str, str], options: CompressOptions) -> SitePlan:
    linears = [layer.linear(path) for path in members.values()]
    per_head = group == "qk" and options.qk == "per-head"
    columns = linears[0].in_features
    rows = sum(linear.out_features for linear in linears) // (layer.kv_groups if per_head else 1)
    rank, reason = _choose_rank(layer, list(members.values()), per_head, columns, rows, options)
    return SitePlan(
        site=f"layers.{layer.index}.{group}",
        layer=layer.index,
        members=tuple(members),
        paths=tuple(members.values()),
        form="dense" if reason else "per_head" if per_head else "joint",
        rank=0 if reason else rank,
        quant=options.quant,
        reason=reason,
    )


def _choose_rank(
    layer: Layer, paths: list[str], per_head: bool, columns: int, rows: int, options: CompressOptions
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
        stacked = torch.cat([layer.linear(path).weight for path in paths])
        wanted = rank_of_energy(singular_values(stacked), rule.value)
    rank = round_rank(wanted, options.rank_multiple or default_multiple(columns, rows, options.quant), largest)
    limit = break_even_rank(columns, rows)
    if rank > limit:
        return 0, f"rank {rank} would cost more than the dense ({rows}, {columns}) matrix: break-even is rank {limit}"
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
