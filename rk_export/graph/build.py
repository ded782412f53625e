"""Rewritten PyTorch model -> ONNX graph with fused low-rank patterns -> model.onnx beside its external data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes
from onnxscript import nn as onn
from torch import nn

from rk_export.graph.dense import frontend
from rk_export.graph.modules.heads import in_slots
from rk_export.graph.modules.identity import PivotFactors
from rk_export.graph.modules.projections import (
    DenseProjection,
    EmbeddingTable,
    Factors,
    Member,
    RotatedProjection,
    TiedDenseHead,
    TiedQuantizedHead,
    bind_weights,
    lazy_tensor,
    projection,
)
from rk_export.graph.modules.sparse import COLUMNS, ENTRIES, SparseProjection
from rk_export.model.decoder_spec import decoder_spec
from rk_export.model.families import Projection
from rk_export.options.quantization import W8A8
from rk_export.passes.base import require, run_graph_passes
from rk_export.passes.graph.attention_mask import AttentionMask
from rk_export.passes.graph.half_scales import HalfScales
from rk_export.passes.graph.logits_start import LogitsStart
from rk_export.passes.graph.nodes import DOWN, MICROSOFT, PART_KEY, SITE_KEY, UP, Mark
from rk_export.passes.graph.packed_projections import (
    ATTENTION_PARTS,
    PackedAttention,
    PackedProjections,
    worth_packing,
)
from rk_export.passes.graph.positions import PositionsFromMask
from rk_export.passes.graph.token_scales import TokenScales
from rk_export.passes.modules.factors import IdentityFactors, JointMember
from rk_export.passes.modules.heads import PaddedHeads, without_slots
from rk_export.passes.modules.quantized import (
    CorrectedLinear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    RotatedHead,
)
from rk_export.passes.modules.sparse import SparseSum, without_sparse
from rk_export.report.records import Fusion
from rk_export.rewrite.apply import Rewritten

logger = logging.getLogger(__name__)

# Tensors below this size stay inside model.onnx: shape inference must be able to read them.
INLINE_BELOW_BYTES = 1024
READS_ATTENTION_INPUT, READS_MLP_INPUT = ("q", "k", "v"), ("gate", "up")


def build_graph(rewritten: Rewritten) -> tuple[ir.Model, tuple[Fusion, ...]]:
    """Return the ONNX graph of a rewritten model, weights bound lazily, and the fusions found in it.

    Raises:
        UnsupportedModelError: If the family cannot be exported exactly.
        FusionError: If a planned pattern is missing.
    """
    options = rewritten.plan.options
    module = frontend.build_module(
        rewritten.model.config,
        ep=options.ep,
        dtype=options.float_dtype,
        positions=options.context_length,
    )
    swapped = _swap_projections(rewritten, module)
    _swap_outer(rewritten, module)
    model = frontend.trace(module)
    _bind(rewritten, module, model, swapped)
    fusions = (*_emitted(rewritten, model), *run_graph_passes(_graph_passes(rewritten), model))
    _finish(model)
    return model, fusions


def save_graph(model: ir.Model, folder: Path) -> None:
    """Write model.onnx and model.onnx.data; weights are converted one at a time."""
    ir.save(
        model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=INLINE_BELOW_BYTES
    )


def _torch_layers(rewritten: Rewritten) -> list[nn.Module]:
    return list(rewritten.model.get_submodule(rewritten.architecture.layers).children())


def _projections(rewritten: Rewritten) -> Iterator[tuple[int, nn.Module, tuple[Projection, ...]]]:
    for index, layer in enumerate(_torch_layers(rewritten)):
        yield index, layer, rewritten.architecture.projections(rewritten.model.config, index)


def _swap_projections(rewritten: Rewritten, module: frontend.OnnxModule) -> set[str]:
    """Put our modules where the plain linears stand; return the torch names of the modules they came from."""
    level = rewritten.plan.options.accuracy_level
    dtype = frontend.float_type(rewritten.plan.options.float_dtype)
    swapped = set()
    for index, layer, projections in _projections(rewritten):
        onnx_layer = _descend(module.module, f"{rewritten.architecture.onnx_layers}.{index}")
        sites = {path: site.site for site in rewritten.plan.of_layer(index) for path in site.paths}
        factors: dict[int, Factors | PivotFactors] = {}
        for item in projections:
            slotted = layer.get_submodule(item.path)
            summed, site = without_slots(slotted), sites[item.path]
            torch_module = without_sparse(summed)
            replacement: onn.Module | None = None
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


def _shared_factors(member: JointMember, site: str, level: int) -> Factors | PivotFactors:
    factors = member.factors
    if isinstance(factors, IdentityFactors):
        return PivotFactors(factors, site, level)
    return Factors(factors, site, level)


def _swap_outer(rewritten: Rewritten, module: frontend.OnnxModule) -> None:
    """Put the embedding and the output projection in, a tied table once."""
    architecture, model = rewritten.architecture, rewritten.model
    if architecture.lm_head is None or architecture.onnx_lm_head is None:
        return
    level = rewritten.plan.options.accuracy_level
    embedding: Any = model.get_submodule(architecture.embedding)
    head: Any = model.get_submodule(architecture.lm_head)
    site = Mark("lm_head", "lm_head")
    rotation = None
    if isinstance(head, RotatedHead):
        rotation, head = projection(head.rotation, Mark("lm_head", "rotation"), level), head.head
    new_head: onn.Module
    if isinstance(embedding, QuantizedEmbedding):
        table = EmbeddingTable(embedding)
        _replace(module.module, architecture.onnx_embedding, table)
        tied = head.codes.data_ptr() == embedding.codes.data_ptr()
        new_head = TiedQuantizedHead(table, head, level) if tied else projection(head, site, level)
    elif head.weight is embedding.weight:
        new_head = TiedDenseHead(_descend(module.module, architecture.onnx_embedding), site)
    else:
        new_head = DenseProjection(head, site)
    if rotation is not None:
        new_head = RotatedProjection(rotation, new_head)
    _replace(module.module, architecture.onnx_lm_head, new_head)


def _descend(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def _replace(module: onn.Module, path: str, new: onn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(_descend(module, parent) if parent else module, name, new)


def _bind(rewritten: Rewritten, module: frontend.OnnxModule, model: ir.Model, swapped: set[str]) -> None:
    """Give every initializer its values.

    Raises:
        TypeError: If an initializer is left without values.
    """
    bind_weights(module.module)
    skip = set(swapped)
    for path in (rewritten.architecture.embedding, rewritten.architecture.lm_head):
        if path and isinstance(rewritten.model.get_submodule(path), QuantizedEmbedding | QuantizedLinear):
            skip.add(path)
    plain: dict[str, torch.Tensor] = {
        name: tensor
        for name, tensor in rewritten.model.state_dict().items()
        if name.rpartition(".")[0] not in skip and "_factors." not in name
    }
    for name, tensor in frontend.rename_weights(module, plain).items():
        value = model.graph.initializers.get(name)
        if value is not None and value.const_value is None:
            value.const_value = lazy_tensor(value, lambda tensor=tensor: tensor)  # type: ignore[misc]
    if empty := [name for name, value in model.graph.initializers.items() if value.const_value is None]:
        raise TypeError(f"initializers without values: {', '.join(sorted(empty)[:5])}")


def _emitted(rewritten: Rewritten, model: ir.Model) -> Iterator[Fusion]:
    """Yield, checked, what the modules should have emitted and what arrived in the traced graph."""
    layers = len(_torch_layers(rewritten))
    counts = Counter((node.domain, node.op_type) for node in model.graph)
    quantized = sum(isinstance(module, QuantizedLinear) for module in rewritten.model.modules())
    int8 = sum(isinstance(module, Int8Linear) for module in rewritten.model.modules())
    pairs = sum(len(list(module.factors.pairs())) for module in _first_members(rewritten))
    downs = [node for node in model.graph if node.metadata_props.get(PART_KEY) == DOWN]
    down_found = sum(
        all(use.node.metadata_props.get(PART_KEY, "").startswith(UP) for use in node.outputs[0].uses())
        for node in downs
    )
    checks = [
        Fusion("shared down-projection", pairs, down_found),
        Fusion("MatMulNBits", quantized, counts[(MICROSOFT, "MatMulNBits")]),
        Fusion("int8 matrices", int8, counts[(MICROSOFT, "DynamicQuantizeMatMul")]),
        *_sparse_products(rewritten, model),
    ]
    if not rewritten.architecture.is_encoder:
        skips = [counts[(MICROSOFT, f"Skip{norm}LayerNormalization")] for norm in ("Simplified", "")]
        checks.append(Fusion("GroupQueryAttention", layers, counts[(MICROSOFT, "GroupQueryAttention")]))
        checks.append(Fusion("residual sum with norm", _planned_skip_norms(rewritten, layers), sum(skips)))
    for fusion in checks:
        require(fusion)
        yield fusion


def _sparse_products(rewritten: Rewritten, model: ir.Model) -> list[Fusion]:
    """Return how many sparse matrices have entries and how many have a product in the graph; none if there are none."""
    planned = sum(
        len(module.indices) > 0 for module in rewritten.model.modules() if isinstance(module, SparseSum)
    )
    found = {
        node.metadata_props[SITE_KEY]
        for node in model.graph
        if node.metadata_props.get(PART_KEY, "").startswith((COLUMNS, ENTRIES))
    }
    return [Fusion("sparse matrices", planned, len(found))] if planned else []


def _planned_skip_norms(rewritten: Rewritten, layers: int) -> int:
    """Return how many norms directly follow a sum: all but the first, which reads the embedding.

    With learned positions the first follows a sum too, that of embedding and position.
    """
    spec = decoder_spec(rewritten.model.config)
    names = spec.norm_names
    inside = layers * sum(name is not None for name in (names.before_attention, names.before_mlp))
    return inside + int(bool(spec.learned_positions)) if inside else 1


def _first_members(rewritten: Rewritten) -> list[JointMember]:
    """Return one member of each factorized site."""
    members: dict[int, JointMember] = {}
    for module in rewritten.model.modules():
        if isinstance(module, JointMember):
            members.setdefault(id(module.factors), module)
    return list(members.values())


def _graph_passes(rewritten: Rewritten) -> list[Any]:
    architecture, config = rewritten.architecture, rewritten.model.config
    packs = attention = int8 = 0
    for _, layer, projections in _projections(rewritten):
        layer_packs, layer_int8, qkv = _planned_packs(layer, projections)
        packs += layer_packs
        int8 += layer_int8
        attention += qkv and not architecture.is_encoder and decoder_spec(config).query_key_norm is None
    passes: list[Any] = [PackedProjections(packs)]
    if not architecture.is_encoder:
        layers = len(_torch_layers(rewritten))
        learned = int(bool(decoder_spec(config).learned_positions))
        passes += [
            PackedAttention(attention),
            AttentionMask(layers),
            PositionsFromMask(learned),
            LogitsStart(1),
        ]
    return [*passes, TokenScales(int8), *([HalfScales()] if _has_half_scales(rewritten) else [])]


def _has_half_scales(rewritten: Rewritten) -> bool:
    """Whether all scales are fp16 and the graph is not: a checkpoint may hold wider ones."""
    kinds = QuantizedLinear | QuantizedEmbedding
    scales = [module.scales for module in rewritten.model.modules() if isinstance(module, kinds)]
    wide_graph = rewritten.plan.options.float_dtype == "fp32"
    return bool(scales) and wide_graph and all(scale.dtype is torch.float16 for scale in scales)


def _planned_packs(layer: nn.Module, projections: tuple[Projection, ...]) -> tuple[int, int, bool]:
    """Return what packing finds in a layer.

    Returns:
        How many products stand for several matrices of one format on one input, how many int8 products there
        are afterwards, and whether attention reads one of the sets, that of q, k and v.
    """
    readers: dict[tuple[object, ...], list[str]] = {}
    seen: set[int] = set()
    for item in projections:
        module = without_sparse(without_slots(layer.get_submodule(item.path)))
        source = _input_of(item)
        if isinstance(module, SparseSum):
            continue
        if isinstance(module, CorrectedLinear):
            readers.setdefault((source, *_format(module.quantized)), []).append(f"{item.role} corrected")
            readers.setdefault((source, *_format(module.down)), []).append(f"{item.role} correction")
            continue
        if not isinstance(module, JointMember):
            readers.setdefault((source, *_format(module)), []).append(item.role)
            continue
        if id(module.factors) in seen:
            continue
        seen.add(id(module.factors))
        for pair in module.factors.pairs():
            readers.setdefault((source, *_format(pair.down)), []).append("down")
            for role, up in pair.ups.items():
                readers.setdefault((id(pair), *_format(up)), []).append(role)
    packed = {
        key: tuple(roles) for key, roles in readers.items() if worth_packing(roles, int8=key[1] == W8A8)
    }
    int8 = sum(1 if key in packed else len(roles) for key, roles in readers.items() if key[1] == W8A8)
    # Padded heads stand between their product and attention.
    direct = not any(isinstance(module, PaddedHeads) for module in layer.modules())
    return len(packed), int8, direct and ATTENTION_PARTS in packed.values()


def _input_of(item: Projection) -> str:
    if item.role in READS_ATTENTION_INPUT:
        return "attention"
    if item.role in READS_MLP_INPUT or (item.role == "expert" and not item.path.endswith("down_proj")):
        return "mlp"
    return item.path


def _format(module: nn.Module) -> tuple[object, ...]:
    spec = module.spec if isinstance(module, QuantizedLinear | Int8Linear) else None
    return (spec, module.bias is None)


def _finish(model: ir.Model) -> None:
    """Drop what only the tracing needed: function bodies of operators that every runtime has, orphans."""
    model.functions.clear()
    model.producer_name, model.producer_version = "rk-export", metadata.version("rk-export")
    for node in model.graph:
        ours = {key: value for key, value in node.metadata_props.items() if key.startswith("rk_export.")}
        node.metadata_props.clear()
        node.metadata_props.update(ours)
    common_passes.RemoveUnusedNodesPass()(model)
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    kept = used | {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for name in [name for name in model.graph.initializers if name not in kept]:
        del model.graph.initializers[name]
