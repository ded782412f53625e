"""What graph passes share: marks on nodes, and reading and writing weights lazily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
SITE_KEY, PART_KEY, RANK_KEY = "rk_export.site", "rk_export.part", "rk_export.rank"
# Parts of a factor pair; a role named "down" is another thing.
DOWN, UP = "factor_down", "factor_up_"
# Parts of the branch that corrects a quantized matrix, followed by down or up and the role.
CORRECTION = "correction_"


@dataclass(frozen=True)
class Mark:
    """Says what a node was made for.

    Args:
        site: The site it belongs to.
        part: A role, `DOWN`, or `UP` and a role.
        rank: Inner dimension of the factor pair; 0 for a dense matrix.
    """

    site: str
    part: str
    rank: int = 0


def mark(value: ir.Value, site: Mark) -> ir.Value:
    """Write a mark on the node that produces a value; returns the value."""
    node = value.producer()
    if node is None:
        raise TypeError(f"{value.name} is produced by no node")
    node.metadata_props[SITE_KEY] = site.site
    node.metadata_props[PART_KEY] = site.part
    if site.rank:
        node.metadata_props[RANK_KEY] = str(site.rank)
    return value


def is_attention(node: ir.Node) -> bool:
    """Whether a node is ONNX Runtime's GroupQueryAttention."""
    return node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT


def weight_of(value: ir.Value | None) -> ir.Value | None:
    """Return the value if it is an initializer, else None."""
    return value if value is not None and value.is_initializer() else None


def concatenated(values: Sequence[ir.Value], axis: int, name: str) -> ir.Value:
    """Return a new initializer that holds others side by side; the bytes are joined when they are written."""
    tensors = []
    for value in values:
        if value.const_value is None:
            raise TypeError(f"{value.name} has no values yet")
        tensors.append(value.const_value)
    shape = [int(size) for size in tensors[0].shape.numpy()]
    shape[axis] = sum(int(tensor.shape.numpy()[axis]) for tensor in tensors)
    dtype = tensors[0].dtype

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(
            np.concatenate([tensor.numpy() for tensor in tensors], axis=axis), dtype=dtype, name=name
        )

    lazy = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return a small initializer, registered in the graph; an equal name is reused."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


class Emitter:
    """Insert nodes before the first node of a graph, in the order of the calls."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix, self.anchor, self.count = graph, prefix, graph[0], 0

    def __call__(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        attrs = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        node = ir.Node(
            "", op_type, inputs, attrs, num_outputs=1, name=f"{self.prefix}.{self.count}.{op_type}"
        )
        self.count += 1
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]
