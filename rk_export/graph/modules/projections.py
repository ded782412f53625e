"""What stands for one linear module while the graph is traced: dense, quantized, or quantized and corrected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import onnx_ir as ir
from onnxscript import OpBuilder
from torch import nn

from rk_export.graph.modules.base import ExportModule, Pattern, operators
from rk_export.graph.modules.bound import Bound
from rk_export.graph.modules.int8 import Int8Projection
from rk_export.passes.graph.nodes import CORRECTION, MICROSOFT, Mark, mark
from rk_export.passes.graph.packing import MatrixFormat, Product, inner
from rk_export.passes.modules.quantized import CorrectedLinear, Int8Linear, QuantizedLinear

UINT8 = ir.DataType.UINT8
NBITS = operators("MatMulNBits", MICROSOFT, "MatMulNBits")


class DenseProjection(Bound):
    """MatMul with a weight stored as (in, out), plus bias.

    Args:
        linear: The PyTorch module, weight (out, in).
        site: What the node belongs to.
    """

    def __init__(self, linear: nn.Linear, site: Mark) -> None:
        super().__init__()
        self._site = site
        self.weight = self.bind((linear.in_features, linear.out_features), lambda: linear.weight.T)
        self.bias = None
        if linear.bias is not None:
            self.bias = self.bind((linear.out_features,), lambda: linear.bias)

    def products(self, source: Hashable) -> tuple[Product, ...]:
        stored = MatrixFormat("MatMul", (self.weight.dtype,), has_bias=self.bias is not None)
        return (Product(source, self._site.site, self._site.part, stored),)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y: ir.Value = mark(op.MatMul(x, self.weight), self._site)
        return y if self.bias is None else op.Add(y, self.bias)


class QuantizedProjection(Bound):
    """MatMulNBits, plus bias.

    Args:
        linear: The PyTorch module with packed codes.
        site: What the node belongs to.
        accuracy_level: 4 computes in int8 on CPU, 0 in floats.
    """

    def __init__(self, linear: QuantizedLinear, site: Mark, accuracy_level: int) -> None:
        super().__init__()
        self._site = site
        self._attributes = nbits_attributes(linear, accuracy_level)
        self.codes = self.bind(tuple(linear.codes.shape), lambda: linear.codes, UINT8)
        self.scales = self.bind(tuple(linear.scales.shape), lambda: linear.scales)
        self.zero_points = self.bias = None
        if (zero_points := linear.zero_points) is not None:
            self.zero_points = self.bind(tuple(zero_points.shape), lambda: zero_points, UINT8)
        if (bias := linear.bias) is not None:
            self.bias = self.bind((linear.out_features,), lambda: bias)

    def emits(self) -> Counter[Pattern]:
        return Counter({NBITS: 1})

    def products(self, source: Hashable) -> tuple[Product, ...]:
        types = tuple(
            value.dtype for value in (self.codes, self.scales, self.zero_points) if value is not None
        )
        attributes = tuple(sorted(item for item in self._attributes.items() if item[0] != "N"))
        stored = MatrixFormat("MatMulNBits", types, attributes, self.bias is not None)
        return (Product(source, self._site.site, self._site.part, stored),)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        zero_points = () if self.zero_points is None else (self.zero_points,)
        product = op.MatMulNBits(
            x, self.codes, self.scales, *zero_points, _domain=MICROSOFT, **self._attributes
        )
        y: ir.Value = mark(product, self._site)
        return y if self.bias is None else op.Add(y, self.bias)


FLOAT_LEVEL = 1  # MatMulNBits computes in fp32


def nbits_attributes(linear: QuantizedLinear, accuracy_level: int) -> dict[str, int]:
    """Return the attributes of a MatMulNBits node; one whose module reads floats has at most level 1."""
    level = min(accuracy_level, FLOAT_LEVEL) if linear.reads_floats else accuracy_level
    return {
        "K": linear.in_features,
        "N": linear.out_features,
        "bits": linear.spec.bits,
        "block_size": linear.spec.block_size,
        "accuracy_level": level,
    }


class CorrectedProjection(ExportModule):
    """MatMulNBits and, beside it, two MatMuls of low rank; their sum.

    Args:
        linear: The PyTorch module.
        site: What the nodes belong to.
        accuracy_level: As in `QuantizedProjection`.
    """

    def __init__(self, linear: CorrectedLinear, site: Mark, accuracy_level: int) -> None:
        super().__init__()
        self._site = site
        rank = linear.down.out_features
        self.quantized = QuantizedProjection(linear.quantized, site, accuracy_level)
        self.down = DenseProjection(linear.down, Mark(site.site, f"{CORRECTION}down_{site.part}", rank))
        self.up = DenseProjection(linear.up, Mark(site.site, f"{CORRECTION}up_{site.part}", rank))

    def products(self, source: Hashable) -> tuple[Product, ...]:
        behind_down = (source, self._site, CORRECTION)
        of_input = (*self.quantized.products(source), *self.down.products(source))
        return inner((*of_input, *self.up.products(behind_down)))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        # A norm may follow. Behind an Add it would be taken for one on the residual stream.
        y: ir.Value = op.Sum(self.quantized(op, x), self.up(op, self.down(op, x)))
        return y


def projection(module: nn.Module, site: Mark, accuracy_level: int) -> ExportModule:
    """Return the onnxscript module of a linear module, dense or quantized."""
    if isinstance(module, QuantizedLinear):
        return QuantizedProjection(module, site, accuracy_level)
    if isinstance(module, CorrectedLinear):
        return CorrectedProjection(module, site, accuracy_level)
    if isinstance(module, Int8Linear):
        return Int8Projection(module, site)
    if isinstance(module, nn.Linear):
        return DenseProjection(module, site)
    raise TypeError(f"{site.site}: no graph form for {type(module).__name__}")
