"""Shared by the tests of the sparse form: plans and parts that keep some of every matrix."""

from __future__ import annotations

from dataclasses import replace

import torch

from rk_export.matrix_id import MatrixId
from rk_export.methods.sparse_sites import Prices
from rk_export.options.ranks import SINGLE_GROUPS
from rk_export.options.recipe import Recipe
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.plan import Plan
from rk_export.planning.planner import decide_plan
from rk_export.source.stored import StoredModel


def parts_of(W: torch.Tensor, rank: int, entries: int) -> Parts:
    """Return the truncated SVD of a matrix and the largest entries of what it leaves."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    root = S[:rank].sqrt()
    up, down = U[:, :rank] * root, root[:, None] * Vh[:rank]
    rest = (W.double() - up @ down).flatten()
    places = rest.abs().topk(entries).indices.sort().values
    return Parts(up.float(), down.float(), places.int(), rest[places].float())


def sparse_plan(
    source: StoredModel, recipe: Recipe, rank: int, entries: int
) -> tuple[Plan, dict[MatrixId, Parts]]:
    """Return a plan that puts every matrix but experts into the sparse form, and its parts."""
    roles = {item.role for item in source.architecture.projections(source.config, 0)}
    groups = tuple(name for name in SINGLE_GROUPS if name in roles)
    plan = decide_plan(source, recipe)
    parts, sites = {}, []
    for layer in source.layers():
        for site in plan.of_layer(layer.index):
            if site.members[0] in groups:
                parts[layer.index, site.paths[0]] = parts_of(
                    layer.linear(site.paths[0]).weight, rank, entries
                )
                quant = site.quant if rank else None
                site = replace(site, form="sparse", rank=rank, entries=entries, quant=quant)
            sites.append(site)
    return replace(plan, sites=tuple(sites)), parts


def cost_of(parts: Parts, prices: Prices) -> float:
    """Return what the parts of one matrix cost."""
    return prices.total(parts.shape, parts.rank, parts.entries)
