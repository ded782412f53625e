"""The embedding and the output projection in the graph; a table that they share is stored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import onnx_ir as ir
from onnxscript import OpBuilder
from onnxscript import nn as onn

from rk_export.graph.modules.base import ExportModule, Pattern
from rk_export.graph.modules.bound import Bound
from rk_export.graph.modules.projections import NBITS, UINT8, nbits_attributes
from rk_export.passes.graph.nodes import MICROSOFT, Mark, mark
from rk_export.passes.graph.packing import MatrixFormat, Product, inner
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear


class EmbeddingTable(Bound):
    """Gather rows of a quantized table with GatherBlockQuantized.

    Args:
        table: The PyTorch module.
    """

    def __init__(self, table: QuantizedEmbedding) -> None:
        super().__init__()
        rows, blocks, bytes_per_block = table.codes.shape
        self._row_bytes = blocks * bytes_per_block
        self._attributes = {"bits": table.spec.bits, "block_size": table.spec.block_size}
        self._columns = table.embedding_dim
        self._padded = blocks * table.spec.block_size > self._columns
        self.codes = self.bind((rows, self._row_bytes), lambda: table.codes.flatten(1), UINT8)
        self.scales = self.bind(tuple(table.scales.shape), lambda: table.scales)
        self.zero_points = None
        if (zero_points := table.zero_points) is not None:
            self.zero_points = self.bind(tuple(zero_points.shape), lambda: zero_points, UINT8)

    def products(self, source: Hashable) -> tuple[Product, ...]:
        """Return the lookup, which is a product with one-hot rows; it packs with no other."""
        types = tuple(
            value.dtype for value in (self.codes, self.scales, self.zero_points) if value is not None
        )
        stored = MatrixFormat("GatherBlockQuantized", types, tuple(sorted(self._attributes.items())))
        return (Product(source, "embedding", "table", stored),)

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        zero_points = () if self.zero_points is None else (self.zero_points,)
        rows: ir.Value = op.GatherBlockQuantized(
            self.codes,
            input_ids,
            self.scales,
            *zero_points,
            gather_axis=0,
            quantize_axis=1,
            _domain=MICROSOFT,
            **self._attributes,
        )
        # The operator knows no column count: a last block that the columns do not fill comes out whole.
        if self._padded:
            rows = op.Slice(rows, [0], [self._columns], [-1])
        # Shape inference knows no rule for the operator; every later shape follows from this one.
        rows.type = ir.TensorType(self.scales.dtype)
        rows.shape = ir.Shape([*(input_ids.shape or ()), self._columns])
        return rows


class TiedQuantizedHead(ExportModule):
    """MatMulNBits on the embedding's own table, which is stored once.

    Args:
        table: The embedding as it was emitted.
        linear: The PyTorch head that shares the table.
        accuracy_level: As in `QuantizedProjection`.
    """

    def __init__(self, table: EmbeddingTable, linear: QuantizedLinear, accuracy_level: int) -> None:
        super().__init__()
        self._table = [table]
        self._shape = list(linear.codes.shape)
        self._attributes = nbits_attributes(linear, accuracy_level)

    def emits(self) -> Counter[Pattern]:
        return Counter({NBITS: 1})

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        table = self._table[0]
        zero_points = () if table.zero_points is None else (table.zero_points,)
        codes = op.Reshape(table.codes, op.Constant(value_ints=self._shape))
        y = op.MatMulNBits(x, codes, table.scales, *zero_points, _domain=MICROSOFT, **self._attributes)
        return mark(y, Mark("lm_head", "lm_head"))


class TiedDenseHead(ExportModule):
    """MatMul with the embedding's own table (vocabulary, dim), transposed by the runtime.

    Args:
        embedding: The module that gathers from the table.
        site: What the node belongs to.
    """

    def __init__(self, embedding: onn.Module, site: Mark) -> None:
        super().__init__()
        self._embedding, self._site = [embedding], site

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        table: ir.Value = self._embedding[0].weight
        return mark(op.MatMul(x, op.Transpose(table, perm=[1, 0])), self._site)


class RotatedProjection(ExportModule):
    """The output projection behind the rotation of `RotatedHead`.

    Args:
        rotation: Maps d to d.
        head: The tied output projection.
    """

    def __init__(self, rotation: ExportModule, head: ExportModule) -> None:
        super().__init__()
        self.rotation, self.head = rotation, head

    def products(self, source: Hashable) -> tuple[Product, ...]:
        return inner(self.rotation.products(source)) + self.head.products((source, "rotated"))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        logits: ir.Value = self.head(op, self.rotation(op, x))
        return logits
