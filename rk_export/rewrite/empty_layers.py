"""Layers and tables as a plan leaves them, without values: what stored tensors are filled into."""

from __future__ import annotations

from typing import Any

from torch import nn

from rk_export.model.architecture import Architecture
from rk_export.model.description import ModelDescription
from rk_export.options.quantization import QuantSpec
from rk_export.passes.base import Layer
from rk_export.passes.modules.quantized import Int8Linear, QuantizedEmbedding, QuantizedLinear, RotatedHead
from rk_export.passes.weights.correction import empty_corrected
from rk_export.passes.weights.embedding import embedding_multiplier, rotation_spec
from rk_export.passes.weights.factorize import empty_factors, install
from rk_export.passes.weights.quantize import matrix_paths
from rk_export.passes.weights.shapes import empty_shape
from rk_export.passes.weights.sparse import empty_sparse
from rk_export.plan import Plan


def changes_before_rounding(plan: Plan, index: int) -> bool:
    """Whether a plan makes more of a layer than rounding its matrices: its shape, or the form of a matrix."""
    return plan.shape_of(index) is not None or any(site.form != "dense" for site in plan.of_layer(index))


def empty_layer(description: ModelDescription, plan: Plan, index: int, *, rounded: bool = True) -> Layer:
    """Return a layer as a plan leaves it, its tensors on meta.

    Args:
        description: Of the model that the plan is applied to.
        plan: The plan.
        index: Of the layer.
        rounded: As it is at last; else as it is before its matrices are rounded.
    """
    layer = Layer(index, description.layer(index), description.heads.kv_heads)
    layer = empty_shape(layer, plan.shape_of(index), plan.of_layer(index))
    for site in plan.of_layer(index):
        if site.form == "sparse":
            empty_sparse(layer, site)
        elif site.form != "dense":
            install(layer, site, empty_factors(layer, site))
        if rounded and site.quant is not None:
            _empty_quantized(layer, list(matrix_paths(layer, site)), site.quant, site.correction)
    return layer


def _empty_quantized(layer: Layer, paths: list[str], spec: QuantSpec, correction: int) -> None:
    for path in paths:
        linear = layer.linear(path)
        if correction:
            layer.replace(path, empty_corrected(linear, spec, correction))
            continue
        rows, columns, bias = linear.out_features, linear.in_features, linear.bias is not None
        layer.replace(
            path,
            Int8Linear.empty(rows, columns, bias=bias)
            if spec.activations == 8
            else QuantizedLinear.empty(rows, columns, spec, bias=bias),
        )


def empty_tables(model: nn.Module, architecture: Architecture, spec: QuantSpec | None) -> None:
    """Put quantized tables without values where a model's embedding and its output projection are, in place.

    Args:
        model: The embedding and the output projection are dense, a rotation in front of the latter included.
        architecture: Its family.
        spec: The format of both; None leaves floats.
    """
    if spec is None:
        return
    embedding: Any = model.get_submodule(architecture.embedding)
    rows, columns = embedding.num_embeddings, embedding.embedding_dim
    table = QuantizedEmbedding.empty(rows, columns, spec, embedding_multiplier(embedding))
    model.set_submodule(architecture.embedding, table)
    path = architecture.lm_head
    if path is None:
        return
    model.set_submodule(path, _empty_head(model.get_submodule(path), spec))


def _empty_head(head: Any, spec: QuantSpec) -> nn.Module:
    """Return an output projection without values; the dense one stays as it is, for others may hold it."""
    dense: Any = head.head if isinstance(head, RotatedHead) else head
    rows, columns = dense.out_features, dense.in_features
    empty = QuantizedLinear.empty(rows, columns, spec, bias=dense.bias is not None)
    if not isinstance(head, RotatedHead):
        return empty
    rotation = QuantizedLinear.empty(columns, columns, rotation_spec(spec), bias=False)
    return RotatedHead(rotation, empty)
