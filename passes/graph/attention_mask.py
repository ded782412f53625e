"""Make GroupQueryAttention honour the attention mask, so that left-padded rows equal single rows.

The operator takes the number of keys of each row and knows nothing of padding in front of them. Every row is
given all keys and a bias from the mask instead: 0 where a key counts and a large negative number where it is
padding. Rotary positions are physical, which attention only sees as differences.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.nodes import MICROSOFT, Emitter, constant
from rk_export.report import Fusion

SEQLENS_K, TOTAL_LENGTH, ATTENTION_BIAS = 5, 6, 10


class AttentionMask:
    """Wire a bias from `attention_mask` into every GroupQueryAttention node.

    Args:
        planned: The number of attention layers.
    """

    name = "left-padding mask"

    def __init__(self, planned: int) -> None:
        self.planned = planned

    def call(self, model: ir.Model) -> Fusion:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT]
        if nodes:
            bias, last_key, total = _mask_values(graph)
            for node in nodes:
                node.resize_inputs(max(len(node.inputs), ATTENTION_BIAS + 1))
                node.replace_input_with(SEQLENS_K, last_key)
                node.replace_input_with(TOTAL_LENGTH, total)
                node.replace_input_with(ATTENTION_BIAS, bias)
        reason = "" if len(nodes) == self.planned else "an attention layer is not GroupQueryAttention"
        return Fusion(self.name, self.planned, len(nodes), reason)


def _mask_values(graph: ir.Graph) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Emit, at the head of the graph, the bias (batch, 1, length, total), seqlens_k (batch) and total ()."""
    inputs = {value.name: value for value in graph.inputs}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    dtype = inputs["past_key_values.0.key"].dtype or ir.DataType.FLOAT
    numpy_dtype = np.float16 if dtype is ir.DataType.FLOAT16 else np.float32
    lowest = np.array([np.finfo(numpy_dtype).min / 2], dtype=numpy_dtype)
    emit = Emitter(graph, "attention_mask")

    one = constant(graph, "rk.one", np.array([1], dtype=np.int64))
    batch = emit("Shape", [mask], start=0, end=1)
    length = emit("Shape", [ids], start=1, end=2)
    total = emit("Shape", [mask], start=1, end=2)
    total_scalar = emit("Squeeze", [emit("Cast", [total], to=int(ir.DataType.INT32))])
    last = emit("Cast", [emit("Sub", [total, one])], to=int(ir.DataType.INT32))
    last_key = emit("Expand", [last, batch])

    padding = emit("Cast", [emit("Sub", [one, mask])], to=int(dtype))
    row_bias = emit("Mul", [padding, constant(graph, f"rk.lowest.{dtype.name}", lowest)])
    axes = constant(graph, "rk.axes", np.array([1, 2], dtype=np.int64))
    row_bias = emit("Unsqueeze", [row_bias, axes])
    bias = emit("Expand", [row_bias, emit("Concat", [batch, one, length, total], axis=0)])
    return bias, last_key, total_scalar
