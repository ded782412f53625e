"""Scales stored in fp16 in an fp32 graph: an fp16 initializer and a Cast in front of the quantized operators.

MatMulNBits and GatherBlockQuantized take scales of the type they compute in. ONNX Runtime folds a Cast of an
initializer when it loads a graph, before it packs weights for its kernels, so the file shrinks by half a bit a
weight (blocks of 32) and nothing runs any slower.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.nodes import MICROSOFT, weight_of
from rk_export.report.records import Fusion

_SCALES_INPUT = {"MatMulNBits": 2, "GatherBlockQuantized": 2}


class HalfScales:
    """Store every scale of the blockwise operators in fp16; the scales must be rounded to fp16 already."""

    name = "fp16 scales"

    def call(self, model: ir.Model) -> Fusion:
        scales = _scales(model.graph)
        stored = [value for value in scales if weight_of(value) is not None]
        for value in stored:
            _store_half(model.graph, value)
        reason = "" if len(stored) == len(scales) else "a scale is computed in the graph"
        return Fusion(self.name, len(scales), len(stored), reason)


def _scales(graph: ir.Graph) -> list[ir.Value]:
    """Return the float32 scales in the graph, each once."""
    found: dict[str, ir.Value] = {}
    for node in graph:
        if node.domain == MICROSOFT and node.op_type in _SCALES_INPUT:
            value = node.inputs[_SCALES_INPUT[node.op_type]]
            if value is not None and value.name is not None and value.dtype is ir.DataType.FLOAT:
                found[value.name] = value
    return list(found.values())


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
