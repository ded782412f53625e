"""Make GroupQueryAttention honour the attention mask, so that a padded row equals the single row.

The operator takes the index of each row's last key and knows nothing of padding in front of the first one. Callers pad
in two ways, and many do not say which: on the left, or on the right with a length of its own for each row. In the
second form the cache of a row has no gaps, whatever the mask shows: after ``1 1 1 0 0`` the next token of that row
overwrites the padding, and its mask is ``1 1 1 1 0`` or ``1 1 1 0 0 1``. So

- in a first call (no past), the last key is the last 1 of the mask, and every 0 is hidden;
- with a past, the last key is (first 1) + (number of ones) - 1, and what lies before the first 1 is hidden.

Rotary positions are physical, which attention only sees as differences. A bias that a node has already, such as that
of ALiBi, stays: the mask's is added to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.base import GraphPass
from rk_export.passes.graph.nodes import Emitter, constant, is_attention

PAST_KEY, SEQLENS_K, TOTAL_LENGTH, ATTENTION_BIAS = 3, 5, 6, 10
# Written on a node whose bias holds the mask.
MASKED_KEY = "rk_export.masked"


class AttentionMask(GraphPass[ir.Node]):
    """Wire a bias from the input `attention_mask` into every GroupQueryAttention node with a cache and without one."""

    name = "padding mask"
    needs = (
        "an attention layer must be GroupQueryAttention with a cache and without the mask in its bias, "
        "in a graph with the inputs input_ids and attention_mask"
    )

    def matches(self, graph: ir.Graph) -> Sequence[ir.Node]:
        if not {"input_ids", "attention_mask"} <= {value.name for value in graph.inputs}:
            return []
        return [
            node
            for node in graph
            if is_attention(node)
            and _input(node, PAST_KEY) is not None
            and MASKED_KEY not in node.metadata_props
        ]

    def rewrite(self, graph: ir.Graph, matches: Sequence[ir.Node]) -> None:
        past_key = matches[0].inputs[PAST_KEY]
        dtype = None if past_key is None else past_key.dtype
        bias, last_key, total = _mask_values(graph, dtype)
        sums: dict[ir.Value, ir.Value] = {}
        for node in matches:
            node.resize_inputs(max(len(node.inputs), ATTENTION_BIAS + 1))
            own = node.inputs[ATTENTION_BIAS]
            if own is not None and own not in sums:
                sums[own] = _added(graph, node, own, bias)
            node.replace_input_with(SEQLENS_K, last_key)
            node.replace_input_with(TOTAL_LENGTH, total)
            node.replace_input_with(ATTENTION_BIAS, bias if own is None else sums[own])
            node.metadata_props[MASKED_KEY] = "true"


def _added(graph: ir.Graph, node: ir.Node, own: ir.Value, bias: ir.Value) -> ir.Value:
    """Emit, in front of the first node that reads a bias of its own, the sum of it and the mask's."""
    adding = ir.Node("", "Add", [own, bias], num_outputs=1, name=f"attention_mask.{own.name}.Add")
    graph.insert_before(node, adding)
    return adding.outputs[0]


def _input(node: ir.Node, slot: int) -> ir.Value | None:
    return node.inputs[slot] if slot < len(node.inputs) else None


def _mask_values(graph: ir.Graph, dtype: ir.DataType | None) -> tuple[ir.Value, ir.Value, ir.Value]:
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
    shape = emit("Concat", [batch, one, length, total], axis=0)
    bias = _bias(graph, emit, hidden, shape, np.float16 if dtype is ir.DataType.FLOAT16 else np.float32)
    total_scalar = emit("Squeeze", [emit("Cast", [total], to=int(ir.DataType.INT32))])
    return bias, last_key, total_scalar


def _positions(graph: ir.Graph, emit: Emitter, total: ir.Value) -> ir.Value:
    """Emit the positions of the mask's columns, (total) int64."""
    start, step = (
        constant(graph, f"rk.scalar_{name}", np.array(n, np.int64)) for n, name in enumerate(("zero", "one"))
    )
    return emit("Range", [start, emit("Squeeze", [total]), step])


def _bias(
    graph: ir.Graph, emit: Emitter, hidden: ir.Value, shape: ir.Value, dtype: type[np.floating]
) -> ir.Value:
    """Emit a large negative number where a key is hidden (batch, total) and 0 elsewhere, for every query."""
    lowest = np.array([np.finfo(dtype).min / 2], dtype=dtype)
    kind = np.dtype(dtype).name
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
