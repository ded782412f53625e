"""Rotary tables in the graph, computed from frequencies when a session loads it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from rk_export.model.rotary import RotaryTable


class Late(nn.Parameter):
    """A constant that gets its value after tracing, so that the tracing folds nothing that is computed from it."""

    def __init__(self, value: np.ndarray) -> None:
        self.late = ir.tensor(value)
        super().__init__(value.shape, dtype=self.late.dtype)
        self._keep_float32 = True  # read by mobius: angles in half precision are no angles


class Rotary(nn.Module):
    """Rotary tables, computed from frequencies.

    All inputs are constants: ONNX Runtime computes the tables once, when it loads the graph. They would take
    megabytes of the file (33 for 131,072 positions of a head of width 64), the frequencies take bytes.
    """

    def __init__(self, table: RotaryTable, name: str, dtype: ir.DataType) -> None:
        super().__init__(name)
        self._scale, self._long_from, self._dtype = table.scale, table.long_from, dtype
        self._parts = []
        for part, prefix in zip(table.parts, ("", "long_"), strict=False):
            rows, frequencies = Late(np.array(part.rows)), Late(part.frequencies[None])
            setattr(self, f"{prefix}rows", rows)
            setattr(self, f"{prefix}frequencies", frequencies)
            self._parts.append((rows, frequencies))

    def forward(self, op: OpBuilder, key_count: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return cosines and sines (positions, width) for a sequence of ``key_count`` tokens, () int64."""
        cos_cache, sin_cache = self._tables(op)
        if self._long_from is None:
            return cos_cache, sin_cache
        short_rows = op.Constant(value_ints=[self._long_from])
        count = op.Reshape(key_count, [1])
        is_long = op.Cast(op.Greater(count, short_rows), to=ir.DataType.INT64)
        start = op.Mul(is_long, short_rows)
        end = op.Add(start, count)
        return op.Slice(cos_cache, start, end, [0]), op.Slice(sin_cache, start, end, [0])

    def _tables(self, op: OpBuilder) -> tuple[ir.Value, ir.Value]:
        """Return all cosines and all sines, the parts below each other."""
        angles = [op.Mul(_positions(op, rows), frequencies) for rows, frequencies in self._parts]
        below = angles[0] if len(angles) == 1 else op.Concat(*angles, axis=0)
        cos, sin = (scaled(op, waves, self._scale) for waves in (op.Cos(below), op.Sin(below)))
        if self._dtype is ir.DataType.FLOAT:
            return cos, sin
        return op.Cast(cos, to=self._dtype), op.Cast(sin, to=self._dtype)


def _positions(op: OpBuilder, rows: ir.Value) -> ir.Value:
    """Return the positions (rows, 1), float32, which holds whole numbers up to 2**24."""
    whole = op.Range(op.Constant(value_int=0), rows, op.Constant(value_int=1))
    positions: ir.Value = op.Unsqueeze(op.Cast(whole, to=ir.DataType.FLOAT), [1])
    return positions


def scaled(op: OpBuilder, value: ir.Value, factor: float) -> ir.Value:
    return value if factor == 1.0 else op.Mul(value, factor)
