"""The onnxscript module that stands for an int8 matrix with int8 inputs while the graph is traced.

It emits DynamicQuantizeMatMul, which takes one scale for all tokens; after projections on one input are packed,
the graph pass `TokenScales` gives every token its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import onnx_ir as ir
from onnxscript import OpBuilder

from rk_export.graph.modules.base import Pattern, operators
from rk_export.graph.modules.bound import Bound
from rk_export.passes.graph.nodes import MICROSOFT, Mark, mark
from rk_export.passes.graph.packing import INT8_PRODUCT, MatrixFormat, Product
from rk_export.passes.modules.quantized import Int8Linear

INT8_MATRICES = operators("int8 matrices", MICROSOFT, INT8_PRODUCT)


class Int8Projection(Bound):
    """DynamicQuantizeMatMul with int8 codes stored as (in, out), plus bias.

    Args:
        linear: The PyTorch module, codes (out, in).
        site: What the node belongs to.
    """

    def __init__(self, linear: Int8Linear, site: Mark) -> None:
        super().__init__()
        self._site = site
        columns, rows = linear.in_features, linear.out_features
        self._rows = rows
        self.codes = self.bind((columns, rows), lambda: linear.codes.T, ir.DataType.INT8)
        self.scales = self.bind((rows,), lambda: linear.scales)
        self.bias = None
        if (bias := linear.bias) is not None:
            self.bias = self.bind((rows,), lambda: bias)

    def emits(self) -> Counter[Pattern]:
        return Counter({INT8_MATRICES: 1})

    def products(self, source: Hashable) -> tuple[Product, ...]:
        stored = MatrixFormat(
            INT8_PRODUCT, (self.codes.dtype, self.scales.dtype), has_bias=self.bias is not None
        )
        return (Product(source, self._site.site, self._site.part, stored),)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y: ir.Value = op.DynamicQuantizeMatMul(x, self.codes, self.scales, _domain=MICROSOFT)
        # Shape inference knows no rule for the operator.
        y.type = ir.TensorType(ir.DataType.FLOAT)
        if x.shape is not None:
            y.shape = ir.Shape([*x.shape[:-1], self._rows])
        mark(y, self._site)
        return y if self.bias is None else op.Add(y, self.bias)
