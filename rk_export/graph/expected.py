"""How often each pattern must be in the graph, from what the export modules declare; held against the graph.

Nothing here looks at a node: modules declare what they emit and which products they hold, `packs` says which of these
become one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir
import torch
from onnxscript import nn as onn

from rk_export.graph.dense.attention import Attention
from rk_export.graph.dense.decoder import SKIP_NORM, Decoder
from rk_export.graph.dense.encoder import Encoder, EncoderAttention
from rk_export.graph.dense.frontend import OnnxModule
from rk_export.graph.modules.base import ExportModule, Pattern
from rk_export.graph.modules.experts import GroupedExperts
from rk_export.graph.modules.factors import SHARED_DOWN
from rk_export.graph.modules.int8 import INT8_MATRICES
from rk_export.graph.modules.projections import NBITS
from rk_export.graph.swap import descend, projections_of
from rk_export.model.architecture import Projection
from rk_export.passes.graph.attention_mask import AttentionMask
from rk_export.passes.graph.base import require
from rk_export.passes.graph.half_scales import BLOCKWISE, HalfScales
from rk_export.passes.graph.logits_start import LogitsStart
from rk_export.passes.graph.packed_attention import PackedAttention
from rk_export.passes.graph.packed_projections import PackedProjections
from rk_export.passes.graph.packing import ATTENTION_ROLES, MatrixFormat, Product, packs, roles_of
from rk_export.passes.graph.positions import PositionsFromMask
from rk_export.passes.graph.sums_apart import SumsApart
from rk_export.passes.graph.token_scales import TokenScales
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear
from rk_export.report.records import Fusion
from rk_export.rewrite.apply import Rewritten

# Looked for where nothing declares them too.
_ALWAYS = (SHARED_DOWN, NBITS, INT8_MATRICES)
_READ_ATTENTION_INPUT, _READ_MLP_INPUT = ("q", "k", "v"), ("gate", "up")


def declared(root: onn.Module) -> Counter[Pattern]:
    """Return how often the modules of a tree say that they emit each pattern."""
    counts: Counter[Pattern] = Counter()
    for module in root.modules():
        if isinstance(module, ExportModule):
            counts += module.emits()
    return counts


def emitted(root: onn.Module, graph: ir.Graph) -> tuple[Fusion, ...]:
    """Hold a traced graph against what the modules of its tree declare.

    Raises:
        FusionError: If a pattern is not there as often as declared.
    """
    planned = declared(root)
    fusions = tuple(
        Fusion(pattern.name, planned[pattern], pattern.count(graph))
        for pattern in dict.fromkeys((*_ALWAYS, *planned))
    )
    for fusion in fusions:
        require(fusion)
    return fusions


def graph_passes(rewritten: Rewritten, module: OnnxModule) -> list[ir.passes.InPlacePass]:
    """Return the passes of a graph, each with the number of patterns that the modules promise."""
    products = _products(rewritten, module)
    groups = packs(products)
    passes: list[ir.passes.InPlacePass] = [PackedProjections(len(groups))]
    if isinstance(module.module, Encoder):
        passes.append(PackedAttention(_attention_packs(module.module, groups)))
        if module.ep == "cpu":
            with_mean = rewritten.description.encoder.norm != "rms"
            passes.append(SumsApart(with_mean * declared(module.module)[SKIP_NORM]))
    if isinstance(module.module, Decoder):
        layers = sum(isinstance(child, Attention) for child in module.module.modules())
        passes += [
            PackedAttention(_attention_packs(module.module, groups)),
            AttentionMask(layers),
            PositionsFromMask(int(module.module.reads_positions)),
            LogitsStart(1),
        ]
    int8 = _after_packing(products, groups, lambda stored: stored.is_int8)
    passes.append(TokenScales(int8, many=rewritten.architecture.is_encoder))
    if _has_half_scales(rewritten):
        scales = _after_packing(products, groups, lambda stored: stored.operator in BLOCKWISE)
        passes.append(HalfScales(scales))
    return passes


def _products(rewritten: Rewritten, module: OnnxModule) -> tuple[Product, ...]:
    """Return all products with stored matrices, each once: members of a site declare those that they share."""
    return tuple(dict.fromkeys((*_layer_products(rewritten, module), *_outer_products(module))))


def _layer_products(rewritten: Rewritten, module: OnnxModule) -> Iterator[Product]:
    shares_norm = not rewritten.architecture.is_encoder and rewritten.description.decoder.shares_norm
    for index, projections in projections_of(rewritten):
        layer = descend(module.module, f"{module.architecture.onnx_layers}.{index}")
        grouped = grouped_experts_of(
            module, layer, has_experts=any(item.role == "expert" for item in projections)
        )
        if grouped is not None:
            yield from grouped.products((index, "experts"))
        for item in projections:
            if grouped is None or item.role != "expert":
                source = (index, _input_of(item, shares_norm=shares_norm))
                yield from descend(layer, item.onnx_path).products(source)


def grouped_experts_of(module: OnnxModule, layer: onn.Module, *, has_experts: bool) -> GroupedExperts | None:
    """Return what stands for all experts of a layer, or None where each is a module of its own."""
    mixture = module.architecture.mixture
    if mixture is None or not has_experts:
        return None
    experts = descend(layer, module.architecture.onnx_path(mixture.experts))
    return experts if isinstance(experts, GroupedExperts) else None


def _outer_products(module: OnnxModule) -> Iterator[Product]:
    architecture = module.architecture
    for path in (architecture.onnx_embedding, architecture.onnx_lm_head):
        outer = descend(module.module, path) if path else None
        if isinstance(outer, ExportModule):
            yield from outer.products(path)


def _input_of(item: Projection, *, shares_norm: bool) -> str:
    if item.role in _READ_ATTENTION_INPUT:
        return "mlp" if shares_norm else "attention"
    if item.role in _READ_MLP_INPUT or (item.role == "expert" and not item.path.endswith("down_proj")):
        return "mlp"
    return item.path


def _attention_packs(root: Decoder | Encoder, groups: Sequence[Sequence[Product]]) -> int:
    """Return how many packs attention takes as they are: q, k and v, with nothing between them and the operator."""
    kinds = Attention | EncoderAttention
    attentions = [child for child in root.modules() if isinstance(child, kinds)]
    taking = tuple(f"layers.{index}." for index, child in enumerate(attentions) if child.takes_products)
    return sum(
        roles_of(group) == ATTENTION_ROLES
        and group[0].site.startswith(taking)
        and all(product.is_whole for product in group)
        for group in groups
    )


def _after_packing(
    products: Sequence[Product], groups: Sequence[Sequence[Product]], wanted: Callable[[MatrixFormat], bool]
) -> int:
    """Return how many products of the wanted formats are left when each group has become one."""
    joined = sum(len(group) - 1 for group in groups if wanted(group[0].format))
    return sum(wanted(product.format) for product in products) - joined


def _has_half_scales(rewritten: Rewritten) -> bool:
    """Whether all scales are fp16 and the graph is not: a checkpoint may hold wider ones."""
    kinds = QuantizedLinear | QuantizedEmbedding
    scales = [module.scales for module in rewritten.model.modules() if isinstance(module, kinds)]
    wide_graph = rewritten.plan.recipe.target.float_dtype == "fp32"
    return bool(scales) and wide_graph and all(scale.dtype is torch.float16 for scale in scales)
