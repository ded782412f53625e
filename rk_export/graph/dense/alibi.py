"""The bias of ALiBi (arXiv 2108.12409): scores of attention fall with the distance between query and key."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from rk_export.model.decoder_spec import DecoderSpec


def distance_bias(
    op: OpBuilder, spec: DecoderSpec, attention_mask: ir.Value, position_ids: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """Return minus ``slope * distance`` of each query and key, (batch, heads, length, keys).

    The softmax takes away what is the same for all keys, so the slope times the number of the key would do. But half
    precision rounds large numbers, and a key that is near must have a small one.

    Args:
        op: Of the graph.
        spec: Of a decoder with slopes.
        attention_mask: (batch, keys) int64.
        position_ids: (batch, length) int64, the position of each token in its row.
        dtype: Of the bias.
    """
    numbers = _columns(op, attention_mask)
    if spec.alibi_skips_holes:
        numbers = _without_holes(op, attention_mask, position_ids, numbers)
    distances = op.Sub(op.Unsqueeze(numbers, [1, 2]), op.Unsqueeze(position_ids, [1, 3]))
    by_head = ir.tensor(np.array(spec.alibi_slopes, np.float32).reshape(1, -1, 1, 1))
    product = op.Mul(op.Constant(value=by_head), op.Cast(distances, to=ir.DataType.FLOAT))
    bias: ir.Value = op.Cast(product, to=dtype)
    return bias


def _columns(op: OpBuilder, mask: ir.Value) -> ir.Value:
    """Return the number of each key, counted from the first token of its row, (batch, keys)."""
    count = op.Gather(op.Shape(mask), op.Constant(value_int=1))
    # ArgMax has no kernel for integers on CUDA; of equal values it takes the first.
    padding = op.ArgMax(op.Cast(mask, to=ir.DataType.FLOAT), axis=1, keepdims=1)
    columns: ir.Value = op.Sub(op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1)), padding)
    return columns


def _without_holes(op: OpBuilder, mask: ir.Value, position_ids: ir.Value, columns: ir.Value) -> ir.Value:
    """Return how many tokens the mask of a first call shows before each key; the cache of a later one has no holes."""
    counts = op.Sub(op.CumSum(mask, op.Constant(value_int=1)), op.Constant(value_int=1))
    one = op.Constant(value_int=1)
    is_first_call = op.Equal(op.Gather(op.Shape(mask), one), op.Gather(op.Shape(position_ids), one))
    numbers: ir.Value = op.Where(is_first_call, counts, columns)
    return numbers
