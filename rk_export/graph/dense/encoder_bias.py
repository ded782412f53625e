"""What is added to the scores of an encoder's attention: padding, windows, biases by relative position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from mobius.components import Embedding
from onnxscript import OpBuilder

from rk_export.graph.modules.base import ExportModule
from rk_export.model.encoder_spec import EncoderSpec
from rk_export.model.relative_positions import FARTHEST, buckets


class ScoreBias(ExportModule):
    """Biases on the scores of queries and keys, one for each window.

    Args:
        spec: What the encoder computes.
        reaches: Of its windows, each once; None sees everything.
        dtype: The graph's floats.
    """

    def __init__(self, spec: EncoderSpec, reaches: Sequence[int | None], dtype: ir.DataType) -> None:
        super().__init__()
        self.table = Embedding(spec.relative_buckets, spec.heads.heads) if spec.relative_buckets else None
        self._reaches, self._dtype = reaches, dtype

    def forward(
        self, op: OpBuilder, attention_mask: ir.Value, length: ir.Value
    ) -> dict[int | None, ir.Value]:
        """Return reach -> bias (batch, 1 or heads, length, length); the lowest number where a key is hidden.

        Args:
            op: The builder.
            attention_mask: (batch, length) int64, 0 at padding.
            length: () int64.
        """
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        places = op.Range(zero, length, one)
        # (length, length): by how much a key stands behind its query.
        behind = op.Sub(op.Unsqueeze(places, [0]), op.Unsqueeze(places, [1]))
        seen = op.Unsqueeze(op.Cast(attention_mask, to=ir.DataType.BOOL), [1, 2])
        batch = op.Shape(attention_mask, start=0, end=1)
        square = op.Concat(
            batch, op.Constant(value_ints=[1]), op.Reshape(length, [1]), op.Reshape(length, [1]), axis=0
        )
        return {
            reach: self._bias(op, self._within(op, seen, behind, reach), behind, square)
            for reach in self._reaches
        }

    def _within(self, op: OpBuilder, seen: ir.Value, behind: ir.Value, reach: int | None) -> ir.Value:
        if reach is None:
            return seen
        near = op.LessOrEqual(op.Abs(behind), op.Constant(value_int=reach))
        within: ir.Value = op.And(seen, op.Unsqueeze(near, [0, 1]))
        return within

    def _bias(self, op: OpBuilder, seen: ir.Value, behind: ir.Value, square: ir.Value) -> ir.Value:
        lowest = np.finfo(self._dtype.numpy()).min / 2
        hidden = op.Constant(value=ir.tensor(np.array(lowest, self._dtype.numpy())))
        nothing = op.Constant(value=ir.tensor(np.array(0, self._dtype.numpy())))
        bias: ir.Value = op.Where(seen, nothing, hidden)
        bias = op.Expand(bias, square) if self.table is None else op.Add(bias, self._relative(op, behind))
        return bias

    def _relative(self, op: OpBuilder, behind: ir.Value) -> ir.Value:
        """Return the learned biases (1, heads, length, length)."""
        if self.table is None:
            raise TypeError("no table of biases")
        by_distance = self.table(op, op.Constant(value=ir.tensor(buckets())))  # (distances, heads)
        farthest = op.Constant(value_int=FARTHEST)
        limited = op.Min(op.Max(behind, op.Neg(farthest)), farthest)
        found = op.Gather(by_distance, op.Add(limited, farthest))
        relative: ir.Value = op.Unsqueeze(op.Transpose(found, perm=[2, 0, 1]), [0])
        return relative
