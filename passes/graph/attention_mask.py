"""Make GroupQueryAttention honour the attention mask, so that a padded row equals the single row.

The operator takes the index of each row's last key and knows nothing of padding in front of the first one. Callers pad
in two ways, and many do not say which: on the left, or on the right with a length of its own for each row. In the
second form the cache of a row has no gaps, whatever the mask shows: after ``1 1 1 0 0`` the next token of that row
overwrites the padding, and its mask is ``1 1 1 1 0`` or ``1 1 1 0 0 1``. So

- in a first call (no past), the last key is the last 1 of the mask, and every 0 is hidden;
- with a past, the last key is (first 1) + (number of ones) - 1, and what lies before the first 1 is hidden.

Rotary positions are physical, which attention only sees as differences.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.nodes import MICROSOFT, Emitter, constant
from rk_export.report.records import Fusion

SEQLENS_K, TOTAL_LENGTH, ATTENTION_BIAS = 5, 6, 10


class AttentionMask:
    """Wire a bias from `attention_mask` into every GroupQueryAttention node.

    Args:
        planned: The number of attention layers.
    """

    name = "padding mask"

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
    emit = Emitter(graph, "attention_mask")
    zero, one = (
        constant(graph, f"rk.{name}", np.array([n], np.int64)) for n, name in enumerate(("zero", "one"))
    )

    batch = emit("Shape", [mask], start=0, end=1)
    length = emit("Shape", [ids], start=1, end=2)
    total = emit("Shape", [mask], start=1, end=2)
    positions = _positions(graph, emit, total)
    is_first_call = emit("Equal", [total, length])

    # ArgMax has no kernel for integers on CUDA; of equal values it takes the first.
    first = emit("ArgMax", [emit("Cast", [mask], to=int(ir.DataType.FLOAT))], axis=1)
    count = emit("ReduceSum", [mask, one])
    last_one = emit("ReduceMax", [emit("Mul", [mask, positions]), one])
    last_of_run = emit("Sub", [emit("Add", [first, count]), one])
    # A row of zeros has no key at all; it gets one, which nobody reads.
    last = emit("Max", [emit("Where", [is_first_call, last_one, last_of_run]), zero])
    last_key = emit("Cast", [emit("Squeeze", [last, one])], to=int(ir.DataType.INT32))

    is_zero, is_before = emit("Equal", [mask, zero]), emit("Less", [positions, first])
    hidden = emit("Or", [is_before, emit("And", [is_first_call, is_zero])])
    bias = _bias(graph, emit, hidden, emit("Concat", [batch, one, length, total], axis=0))
    total_scalar = emit("Squeeze", [emit("Cast", [total], to=int(ir.DataType.INT32))])
    return bias, last_key, total_scalar


def _positions(graph: ir.Graph, emit: Emitter, total: ir.Value) -> ir.Value:
    """Emit the positions of the mask's columns, (total) int64."""
    start, step = (
        constant(graph, f"rk.scalar_{name}", np.array(n, np.int64)) for n, name in enumerate(("zero", "one"))
    )
    return emit("Range", [start, emit("Squeeze", [total]), step])


def _bias(graph: ir.Graph, emit: Emitter, hidden: ir.Value, shape: ir.Value) -> ir.Value:
    """Emit a large negative number where a key is hidden (batch, total) and 0 elsewhere, for every query."""
    dtype = next(value.dtype for value in graph.inputs if value.name == "past_key_values.0.key")
    numpy_dtype = np.float16 if dtype is ir.DataType.FLOAT16 else np.float32
    lowest = np.array([np.finfo(numpy_dtype).min / 2], dtype=numpy_dtype)
    kind = np.dtype(numpy_dtype).name
    by_key = emit(
        "Where",
        [
            hidden,
            constant(graph, f"rk.lowest.{kind}", lowest),
            constant(graph, f"rk.none.{kind}", np.zeros_like(lowest)),
        ],
    )
    axes = constant(graph, "rk.axes", np.array([1, 2], dtype=np.int64))
    return emit("Expand", [emit("Unsqueeze", [by_key, axes]), shape])
