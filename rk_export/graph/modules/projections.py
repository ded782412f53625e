"""onnxscript modules that stand for the rewritten PyTorch modules while the graph is traced.

Each holds the PyTorch tensors of its parameters; `bind_weights` hands them to the traced graph as lazy tensors,
so that a weight is converted when it is written and never held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from onnxscript import nn as onn
from torch import Tensor, nn

from rk_export.graph.modules.int8 import Int8Projection
from rk_export.passes.graph.nodes import CORRECTION, DOWN, MICROSOFT, UP, Mark, mark
from rk_export.passes.modules.factors import GroupedFactors, JointFactors
from rk_export.passes.modules.quantized import (
    CorrectedLinear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
)

NUMPY_DTYPE = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT8: np.int8,
    ir.DataType.INT32: np.int32,
}


class Bound(onn.Module):
    """A module whose parameters carry PyTorch tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[tuple[onn.Parameter, Callable[[], Tensor]]] = []

    def bind(
        self, shape: tuple[int, ...], tensor: Callable[[], Tensor], *, packed: bool = False
    ) -> onn.Parameter:
        """Return a parameter of a shape whose values `tensor` returns when they are written."""
        parameter = onn.Parameter(shape, dtype=ir.DataType.UINT8 if packed else ir.DataType.FLOAT)
        self.sources.append((parameter, tensor))
        return parameter


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
        self.codes = self.bind(tuple(linear.codes.shape), lambda: linear.codes, packed=True)
        self.scales = self.bind(tuple(linear.scales.shape), lambda: linear.scales)
        self.zero_points = self.bias = None
        if (zero_points := linear.zero_points) is not None:
            self.zero_points = self.bind(tuple(zero_points.shape), lambda: zero_points, packed=True)
        if (bias := linear.bias) is not None:
            self.bias = self.bind((linear.out_features,), lambda: bias)

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


@dataclass
class _Pair:
    """One factor pair; its down-projection is emitted once for each input value."""

    down: onn.Module
    ups: dict[str, onn.Module]
    emitted: dict[int, tuple[ir.Value, ir.Value]]

    def member(self, op: OpBuilder, role: str, x: ir.Value) -> ir.Value:
        if id(x) not in self.emitted:
            self.emitted[id(x)] = (x, self.down(op, x))
        y: ir.Value = self.ups[role](op, self.emitted[id(x)][1])
        return y


class Factors(onn.Module):
    """The factor pairs that the members of a site share.

    Args:
        factors: The PyTorch factors.
        site: Name of the site; the pairs of a grouped site are numbered.
        accuracy_level: As in `QuantizedProjection`.
    """

    def __init__(self, factors: JointFactors | GroupedFactors, site: str, accuracy_level: int) -> None:
        super().__init__()
        self._pairs: list[_Pair] = []
        for number, pair in enumerate(factors.pairs()):
            name = site if isinstance(factors, JointFactors) else f"{site}.{number}"
            down = projection(pair.down, Mark(name, DOWN, pair.rank), accuracy_level)
            ups = {
                role: projection(up, Mark(name, UP + role, pair.rank), accuracy_level)
                for role, up in pair.ups.items()
            }
            for part, module in {DOWN: down, **{UP + role: up for role, up in ups.items()}}.items():
                setattr(self, f"{part}_{number}", module)
            self._pairs.append(_Pair(down, ups, {}))

    def member(self, op: OpBuilder, role: str, x: ir.Value) -> ir.Value:
        """Emit one member; the groups' outputs stand side by side."""
        parts = [pair.member(op, role, x) for pair in self._pairs]
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=-1)


class SharedFactors(Protocol):
    """What the members of a site share."""

    def member(self, op: OpBuilder, role: str, x: ir.Value) -> ir.Value:
        """Emit one member."""
        ...


class Member(onn.Module):
    """Stands where a member's linear module stood."""

    def __init__(self, factors: SharedFactors, role: str) -> None:
        super().__init__()
        self._factors, self._role = [factors], role

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self._factors[0].member(op, self._role, x)


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
        self.codes = self.bind((rows, self._row_bytes), lambda: table.codes.flatten(1), packed=True)
        self.scales = self.bind(tuple(table.scales.shape), lambda: table.scales)
        self.zero_points = None
        if (zero_points := table.zero_points) is not None:
            self.zero_points = self.bind(tuple(zero_points.shape), lambda: zero_points, packed=True)

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


class TiedQuantizedHead(onn.Module):
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

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        table = self._table[0]
        zero_points = () if table.zero_points is None else (table.zero_points,)
        codes = op.Reshape(table.codes, op.Constant(value_ints=self._shape))
        y = op.MatMulNBits(x, codes, table.scales, *zero_points, _domain=MICROSOFT, **self._attributes)
        return mark(y, Mark("lm_head", "lm_head"))


class TiedDenseHead(onn.Module):
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


class RotatedProjection(onn.Module):
    """The output projection behind the rotation of `RotatedHead`.

    Args:
        rotation: Maps d to d.
        head: The tied output projection.
    """

    def __init__(self, rotation: onn.Module, head: onn.Module) -> None:
        super().__init__()
        self.rotation, self.head = rotation, head

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        logits: ir.Value = self.head(op, self.rotation(op, x))
        return logits


class CorrectedProjection(onn.Module):
    """MatMulNBits and, beside it, two MatMuls of low rank; their sum.

    Args:
        linear: The PyTorch module.
        site: What the nodes belong to.
        accuracy_level: As in `QuantizedProjection`.
    """

    def __init__(self, linear: CorrectedLinear, site: Mark, accuracy_level: int) -> None:
        super().__init__()
        rank = linear.down.out_features
        self.quantized = QuantizedProjection(linear.quantized, site, accuracy_level)
        self.down = DenseProjection(linear.down, Mark(site.site, f"{CORRECTION}down_{site.part}", rank))
        self.up = DenseProjection(linear.up, Mark(site.site, f"{CORRECTION}up_{site.part}", rank))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y: ir.Value = op.Add(self.quantized(op, x), self.up(op, self.down(op, x)))
        return y


def projection(module: nn.Module, site: Mark, accuracy_level: int) -> onn.Module:
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


def bind_weights(root: onn.Module) -> None:
    """Give every parameter under `root` its values, lazily."""
    for module in root.modules():
        for parameter, tensor in getattr(module, "sources", ()):
            parameter.const_value = lazy_tensor(parameter, tensor)


def lazy_tensor(parameter: ir.Value, tensor: Callable[[], Tensor]) -> ir.LazyTensor:
    """Return a tensor that is converted to the parameter's type when it is read."""
    dtype = parameter.dtype
    if dtype is None or parameter.shape is None:
        raise TypeError(f"{parameter.name} has no type")
    numpy_dtype = NUMPY_DTYPE[dtype]

    def evaluate() -> ir.TensorProtocol:
        array: Any = tensor().detach().cpu().to(_TORCH_DTYPE[numpy_dtype]).contiguous().numpy()
        return ir.Tensor(array, dtype=dtype, name=parameter.name)

    return ir.LazyTensor(
        evaluate, dtype=dtype, shape=ir.Shape(parameter.shape), name=parameter.name, cache=False
    )


_TORCH_DTYPE: dict[Any, torch.dtype] = {
    np.float32: torch.float32,
    np.float16: torch.float16,
    np.uint8: torch.uint8,
    np.int8: torch.int8,
    np.int32: torch.int32,
}
