"""Scales stored in fp16 in an fp32 graph: an fp16 initializer and a Cast in front of the quantized operators.

MatMulNBits, GatherBlockQuantized and QMoE take scales of the type they compute in. ONNX Runtime folds a Cast of an
initializer when it loads a graph, before it packs weights for its kernels, so the file shrinks by half a bit a
weight (blocks of 32) and nothing runs any slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.base import GraphPass
from rk_export.passes.graph.nodes import MICROSOFT, weight_of
from rk_export.passes.graph.packing import GROUPED_PRODUCT

# Operator -> its inputs that are scales.
BLOCKWISE = {"MatMulNBits": (2,), "GatherBlockQuantized": (2,), GROUPED_PRODUCT: (3, 6)}


class HalfScales(GraphPass[ir.Value]):
    """Store every scale of the blockwise operators in fp16; the scales must be rounded to fp16 already."""

    name = "fp16 scales"
    needs = "a scale must be stored in float32, not computed in the graph"

    def matches(self, graph: ir.Graph) -> Sequence[ir.Value]:
        """Return the stored float32 scales, each once."""
        read = [
            node.inputs[place]
            for node in graph
            if node.domain == MICROSOFT
            for place in BLOCKWISE.get(node.op_type, ())
        ]
        stored = [value for value in map(weight_of, read) if value is not None]
        return list(dict.fromkeys(value for value in stored if value.dtype is ir.DataType.FLOAT))

    def rewrite(self, graph: ir.Graph, matches: Sequence[ir.Value]) -> None:
        for value in matches:
            _store_half(graph, value)


def _store_half(graph: ir.Graph, value: ir.Value) -> None:
    """Put an fp16 initializer and a Cast in the place of an initializer."""
    tensor = value.const_value
    if tensor is None or tensor.name is None:
        raise TypeError(f"{value.name} has no values yet")
    name = f"{value.name}.fp16"

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float16), name=name)

    half = ir.LazyTensor(evaluate, dtype=ir.DataType.FLOAT16, shape=tensor.shape, name=name, cache=False)  # type: ignore[arg-type]
    stored = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=half)
    graph.register_initializer(stored)
    attributes = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
    cast = ir.Node("", "Cast", [stored], attributes, num_outputs=1, name=f"{value.name}.cast")
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
    graph.insert_before(graph[0], cast)
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    del graph.initializers[value.name]  # type: ignore[arg-type]
