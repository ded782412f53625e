"""Low rank plus sparse in the graph: the sum of a factor pair's product and those of the sparse matrix.

Columns of S that are nearly full are a dense matrix behind a Gather of the inputs they read. The other entries are
stored as half-precision values and one-byte distances between their places: 3 bytes an entry, where ONNX' own
sparse initializers take 12 (float32 and int64). The nodes that spread them out read nothing but initializers, so the
runtime folds them into one dense matrix when it loads the graph: the file is smaller, the product is not faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import onnx_ir as ir
from onnxscript import OpBuilder
from torch import Tensor

from rk_export.graph.modules.base import ExportModule, Pattern
from rk_export.graph.modules.bound import Bound
from rk_export.graph.modules.projections import UINT8
from rk_export.passes.graph.nodes import PART_KEY, SITE_KEY, Mark, mark
from rk_export.passes.graph.packing import Product, inner
from rk_export.passes.modules.sparse import SparseSum
from rk_export.passes.numerics.gaps import encode_gaps
from rk_export.passes.numerics.low_rank_plus_sparse import SplitColumns, split_columns
from rk_export.passes.weights.sparse import ENTRY_BYTES, VALUE_BYTES

# Parts of the sparse matrix, followed by the role.
COLUMNS, ENTRIES = "sparse_columns_", "sparse_entries_"
_INDEX_BYTES = 4


def _sparse_sites(graph: ir.Graph) -> int:
    """Count the sites that have a product with a part of a sparse matrix."""
    parts = (COLUMNS, ENTRIES)
    nodes = (node for node in graph if node.metadata_props.get(PART_KEY, "").startswith(parts))
    return len({node.metadata_props[SITE_KEY] for node in nodes})


SPARSE = Pattern("sparse matrices", _sparse_sites)


class SparseProjection(Bound):
    """B A x + S x + b.

    Args:
        module: The PyTorch module.
        low_rank: Emits B A x; None where there is none.
        site: What the nodes belong to; `part` is the role.
        dtype: Float type of the graph.
    """

    def __init__(
        self, module: SparseSum, low_rank: ExportModule | None, site: Mark, dtype: ir.DataType
    ) -> None:
        super().__init__()
        self.low_rank = low_rank
        shape = (module.out_features, module.in_features)
        split = _split(module, shape)
        self.columns = _Columns(split, site, dtype) if len(split.columns) else None
        self.entries = _Entries(split, shape, site, dtype) if len(split.indices) else None
        self.bias = None
        if (bias := module.bias) is not None:
            self.bias = self.bind(tuple(bias.shape), lambda: bias)
        self._shape = shape

    def emits(self) -> Counter[Pattern]:
        return Counter({SPARSE: int(self.columns is not None or self.entries is not None)})

    def products(self, source: Hashable) -> tuple[Product, ...]:
        """Return those of the low rank: the sparse matrix is no initializer that could be stacked."""
        return () if self.low_rank is None else inner(self.low_rank.products(source))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        parts = [part(op, x) for part in (self.low_rank, self.columns, self.entries) if part is not None]
        if len(parts) > 1:
            # A norm may follow. Behind an Add it would be taken for one on the residual stream.
            y: ir.Value = op.Sum(*parts)
        else:
            y = parts[0] if parts else self._nothing(op, x)
        return y if self.bias is None else op.Add(y, self.bias)

    def _nothing(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return zeros in the shape of the output: nothing of the matrix was kept."""
        zeros = op.Mul(op.ReduceSum(x, [-1], keepdims=1), op.CastLike(op.Constant(value_float=0.0), x))
        y: ir.Value = op.Expand(zeros, op.Constant(value_ints=[1, 1, self._shape[0]]))
        return y


def _split(module: SparseSum, shape: tuple[int, int]) -> SplitColumns:
    return split_columns(
        shape,
        module.indices.cpu(),
        module.values.cpu(),
        dense_bytes=VALUE_BYTES + _INDEX_BYTES / shape[0],
        sparse_bytes=ENTRY_BYTES,
    )


class _Half(Bound):
    """A module with initializers in half precision."""

    def bind_half(self, values: Tensor, dtype: ir.DataType) -> None:
        self._dtype = dtype
        self.values = self.bind(tuple(values.shape), lambda: values, ir.DataType.FLOAT16)

    def widened(self, op: OpBuilder) -> ir.Value:
        """Emit the values in the graph's float type."""
        if self._dtype is ir.DataType.FLOAT16:
            stored: ir.Value = self.values
            return stored
        wide: ir.Value = op.Cast(self.values, to=int(self._dtype))
        return wide


class _Columns(_Half):
    """The nearly full columns: a product with the inputs that they read."""

    def __init__(self, split: SplitColumns, site: Mark, dtype: ir.DataType) -> None:
        super().__init__()
        self._site = Mark(site.site, COLUMNS + site.part)
        self.bind_half(split.weights.T.contiguous(), dtype)
        self.places = self.bind((len(split.columns),), lambda: split.columns, ir.DataType.INT32)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        read = op.Gather(x, self.places, axis=-1)
        return mark(op.MatMul(read, self.widened(op)), self._site)


class _Entries(_Half):
    """The other entries: a product with the matrix that is spread out when the graph is loaded."""

    def __init__(self, split: SplitColumns, shape: tuple[int, int], site: Mark, dtype: ir.DataType) -> None:
        super().__init__()
        self._site, (rows, columns) = Mark(site.site, ENTRIES + site.part), shape
        self._size, self._shape = rows * columns, [columns, rows]
        indices = split.indices.long()
        places, order = ((indices % columns) * rows + indices // columns).sort()  # those of the transpose
        gaps, values = encode_gaps(places, split.values[order])
        self.bind_half(values, dtype)
        self.gaps = self.bind(tuple(gaps.shape), lambda: gaps, UINT8)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        places = op.CumSum(op.Cast(self.gaps, to=int(ir.DataType.INT64)), op.Constant(value_int=0))
        zero = ir.tensor([0.0], dtype=self._dtype)
        zeros = op.ConstantOfShape(op.Constant(value_ints=[self._size]), value=zero)
        flat = op.ScatterElements(zeros, places, self.widened(op), axis=0)
        matrix = op.Reshape(flat, op.Constant(value_ints=self._shape))
        return mark(op.MatMul(x, matrix), self._site)
