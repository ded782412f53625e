"""The onnxscript module that stands for an int8 matrix with int8 inputs while the graph is traced.

It emits DynamicQuantizeMatMul, which takes one scale for all tokens; after projections on one input are packed,
the graph pass `TokenScales` gives every token its own.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnxscript import OpBuilder
from onnxscript import nn as onn
from torch import Tensor

from rk_export.passes.graph.nodes import MICROSOFT, Mark, mark
from rk_export.passes.modules.quantized import Int8Linear


class Int8Projection(onn.Module):
    """DynamicQuantizeMatMul with int8 codes stored as (in, out), plus bias.

    Args:
        linear: The PyTorch module, codes (out, in).
        site: What the node belongs to.
    """

    def __init__(self, linear: Int8Linear, site: Mark) -> None:
        super().__init__()
        self._site = site
        self.sources: list[tuple[onn.Parameter, Callable[[], Tensor]]] = []
        columns, rows = linear.in_features, linear.out_features
        self._rows = rows
        self.codes = self._bind((columns, rows), lambda: linear.codes.T, ir.DataType.INT8)
        self.scales = self._bind((rows,), lambda: linear.scales)
        self.bias = None
        if (bias := linear.bias) is not None:
            self.bias = self._bind((rows,), lambda: bias)

    def _bind(
        self, shape: tuple[int, ...], tensor: Callable[[], Tensor], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> onn.Parameter:
        parameter = onn.Parameter(shape, dtype=dtype)
        self.sources.append((parameter, tensor))
        return parameter

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y: ir.Value = op.DynamicQuantizeMatMul(x, self.codes, self.scales, _domain=MICROSOFT)
        # Shape inference knows no rule for the operator.
        y.type = ir.TensorType(ir.DataType.FLOAT)
        if x.shape is not None:
            y.shape = ir.Shape([*x.shape[:-1], self._rows])
        mark(y, self._site)
        return y if self.bias is None else op.Add(y, self.bias)
