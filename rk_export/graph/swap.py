"""Puts our modules where the dense graph has its plain linears and tables, one for each rewritten PyTorch module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnxscript import nn as onn

from rk_export.graph.dense import frontend
from rk_export.graph.modules.base import ExportModule
from rk_export.graph.modules.experts import GroupedExperts
from rk_export.graph.modules.factors import FactorPairs, Member
from rk_export.graph.modules.heads import in_slots
from rk_export.graph.modules.identity import PivotFactors
from rk_export.graph.modules.projections import DenseProjection, projection
from rk_export.graph.modules.sparse import SparseProjection
from rk_export.graph.modules.tables import (
    EmbeddingTable,
    RotatedProjection,
    TiedDenseHead,
    TiedQuantizedHead,
)
from rk_export.model.architecture import Projection
from rk_export.model.canonical import Experts
from rk_export.passes.graph.nodes import Mark
from rk_export.passes.modules.factors import IdentityFactors, JointMember
from rk_export.passes.modules.heads import without_slots
from rk_export.passes.modules.quantized import QuantizedEmbedding, RotatedHead
from rk_export.passes.modules.sparse import SparseSum, without_sparse
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.expert_groups import grouped_layers


def projections_of(rewritten: Rewritten) -> Iterator[tuple[int, tuple[Projection, ...]]]:
    """Yield the matrices of every layer, with the layer's index."""
    layers = rewritten.model.get_submodule(rewritten.architecture.layers)
    for index, _ in enumerate(layers.children()):
        yield index, rewritten.description.projections(index)


def swap_projections(rewritten: Rewritten, module: frontend.OnnxModule, *, group_experts: bool) -> set[str]:
    """Put our modules where the plain linears stand; return the torch names of the modules they came from."""
    level = rewritten.plan.recipe.target.accuracy_level
    dtype = frontend.float_type(rewritten.plan.recipe.target.float_dtype)
    swapped: set[str] = set()
    in_one_node = grouped_layers(rewritten) if group_experts else {}
    for index, projections in projections_of(rewritten):
        layer = rewritten.model.get_submodule(f"{rewritten.architecture.layers}.{index}")
        onnx_layer = descend(module.module, f"{rewritten.architecture.onnx_layers}.{index}")
        sites = {path: site.site for site in rewritten.plan.of_layer(index) for path in site.paths}
        factors: dict[int, FactorPairs | PivotFactors] = {}
        grouped: set[str] = set()
        if index in in_one_node:
            grouped = _group_experts(rewritten, index, in_one_node[index], onnx_layer)
            swapped |= {f"{rewritten.architecture.layers}.{index}.{path}" for path in grouped}
        for item in projections:
            if item.path in grouped:
                continue
            slotted = layer.get_submodule(item.path)
            summed, site = without_slots(slotted), sites[item.path]
            torch_module = without_sparse(summed)
            replacement: ExportModule | None = None
            if isinstance(torch_module, JointMember):
                key = id(torch_module.factors)
                if key not in factors:
                    factors[key] = _shared_factors(torch_module, site, level)
                    setattr(onnx_layer, f"{site.rpartition('.')[2]}_factors", factors[key])
                replacement = Member(factors[key], torch_module.role)
            if isinstance(summed, SparseSum):
                replacement = SparseProjection(summed, replacement, Mark(site, item.role), dtype)
            elif replacement is None:
                part = item.path.rpartition(".experts.")[2] if item.role == "expert" else item.role
                replacement = projection(torch_module, Mark(site, part), level)
            _replace(onnx_layer, item.onnx_path, in_slots(slotted, replacement))
            path = f"{rewritten.architecture.layers}.{index}.{item.path}"
            swapped |= {f"{path}.{name}".rstrip(".") for name, _ in slotted.named_modules()}
    return swapped


def _group_experts(rewritten: Rewritten, index: int, experts: Experts, onnx_layer: onn.Module) -> set[str]:
    """Put one node in the place of a layer's experts; return the paths of their matrices in the torch layer."""
    spec, mixture = rewritten.description.decoder.experts, rewritten.architecture.mixture
    if spec is None or mixture is None:
        raise TypeError(f"layer {index} has no experts")
    target = rewritten.plan.recipe.target
    module = GroupedExperts(
        experts,
        spec.per_token,
        Mark(f"layers.{index}.experts", "experts"),
        target.accuracy_level,
        on_cpu=target.ep == "cpu",
    )
    _replace(onnx_layer, rewritten.architecture.onnx_path(mixture.experts), module)
    return {item.path for item in rewritten.description.projections(index) if item.role == "expert"}


def _shared_factors(member: JointMember, site: str, level: int) -> FactorPairs | PivotFactors:
    factors = member.factors
    if isinstance(factors, IdentityFactors):
        return PivotFactors(factors, site, level)
    return FactorPairs(factors, site, level)


def swap_outer(rewritten: Rewritten, module: frontend.OnnxModule) -> None:
    """Put the embedding in and the output projection of a decoder, a tied table once."""
    architecture, model = rewritten.architecture, rewritten.model
    level = rewritten.plan.recipe.target.accuracy_level
    embedding: Any = model.get_submodule(architecture.embedding)
    if architecture.lm_head is None or architecture.onnx_lm_head is None:
        if isinstance(embedding, QuantizedEmbedding):
            _replace(module.module, architecture.onnx_embedding, EmbeddingTable(embedding))
        return
    head: Any = model.get_submodule(architecture.lm_head)
    site = Mark("lm_head", "lm_head")
    rotation = None
    if isinstance(head, RotatedHead):
        rotation, head = projection(head.rotation, Mark("lm_head", "rotation"), level), head.head
    new_head: ExportModule
    if isinstance(embedding, QuantizedEmbedding):
        table = EmbeddingTable(embedding)
        _replace(module.module, architecture.onnx_embedding, table)
        tied = head.codes.data_ptr() == embedding.codes.data_ptr()
        new_head = TiedQuantizedHead(table, head, level) if tied else projection(head, site, level)
    elif head.weight is embedding.weight:
        new_head = TiedDenseHead(descend(module.module, architecture.onnx_embedding), site)
    else:
        new_head = DenseProjection(head, site)
    if rotation is not None:
        new_head = RotatedProjection(rotation, new_head)
    _replace(module.module, architecture.onnx_lm_head, new_head)


def descend(module: Any, path: str) -> Any:
    """Return the module at a path; numbers are places in a list."""
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def _replace(module: onn.Module, path: str, new: onn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(descend(module, parent) if parent else module, name, new)
