"""Which matrices of a quantized checkpoint keep their codes, and where those are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from rk_export.model.canonical import JoinedLinear, cut_rows
from rk_export.model.sites import dense_sites
from rk_export.options.recipe import Recipe
from rk_export.passes.base import Layer
from rk_export.passes.numerics.grid import Grid, block_spec
from rk_export.passes.weights.carry import Grids, why_not
from rk_export.plan import SitePlan
from rk_export.report.records import Finding, Outcome
from rk_export.source.protocol import Source

# Checkpoints name some experts in another way than the modules that transformers 5 makes of them.
_STORED_NAMES = {
    "mixtral": {
        "mlp.experts": "block_sparse_moe.experts",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
    }
}


def carried_sites(source: Source, recipe: Recipe) -> Iterator[SitePlan]:
    """Yield every site of a model: carried over where its codes can be, else as the options say, with the reason.

    Args:
        source: A quantized checkpoint; its weights are read.
        recipe: What becomes of matrices that cannot be carried over, and the graph's float type.
    """
    grids = source_grids(source)
    for layer in source.layers():
        projections = source.description.projections(layer.index)
        for site in dense_sites(layer, projections, recipe):
            yield _carried(layer, site, grids, recipe)


def source_grids(source: Source) -> Grids:
    """Return where the codes of a layer's matrices come from: the rows of the stored matrix that each is cut from."""
    layers, names = source.architecture.layers, _STORED_NAMES.get(source.config.model_type, {})

    def find(layer: Layer, path: str) -> Grid | None:
        parent, _, role = path.rpartition(".")
        joined = layer.module.get_submodule(parent)
        stored = parent if isinstance(joined, JoinedLinear) else path
        for ours, theirs in names.items():
            stored = stored.replace(ours, theirs)
        grid = source.grid(f"{layers}.{layer.index}.{stored}.weight")
        if grid is None or not isinstance(joined, JoinedLinear):
            return grid
        return grid.rows(_rows(joined, role))

    return find


def head_findings(source: Source, recipe: Recipe) -> Iterator[Finding]:
    """Yield that the codes of an output projection are not carried over, where there are any."""
    head = source.architecture.lm_head
    if recipe.carries and head and source.grid(f"{head}.weight") is not None:
        reason = "its codes are not carried over: it is stored in the format of the embedding"
        yield Finding(head, Outcome.SKIPPED, reason)


def _rows(joined: JoinedLinear, role: str) -> Tensor:
    """Return which rows of the joined matrix are those of a child, in its order."""
    counts = {name: cast(int, child.out_features) for name, child in joined.named_children()}
    rows = cut_rows(torch.arange(sum(counts.values())), list(counts.values()), joined.groups)
    return dict(zip(counts, rows, strict=True))[role]


def _carried(layer: Layer, site: SitePlan, grids: Grids, recipe: Recipe) -> SitePlan:
    specs = set()
    for path in site.paths:
        grid = grids(layer, path)
        reason = why_not(grid, layer.linear(path), recipe.target.float_dtype)
        if reason or grid is None:
            return _anew(site, f"{path}: {reason}")
        specs.add(block_spec(grid))
    if len(specs) != 1:
        return _anew(site, "its matrices are stored in different bits, blocks or symmetry")
    return replace(site, quant=specs.pop(), carried=True)


def _anew(site: SitePlan, reason: str) -> SitePlan:
    instead = "stays in floats" if site.quant is None else "is quantized anew"
    return replace(site, reason=f"not carried over, {instead}: {reason}")
