"""Quantized matrices in a PyTorch model, and the rotation in front of a tied output projection.

A rewritten model stays a model: it evaluates, saves and loads. Factor pairs stand in `factors.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.passes.numerics.int8 import Int8Matrix, int8_product
from rk_export.passes.numerics.int8_inputs import int8_inputs
from rk_export.passes.numerics.quantize import QuantizedMatrix, dequantize

# Entries of a matrix that are dequantized at a time.
TOGETHER = 1 << 23
# The kernels of matrix products take rows in groups of at most so many: slices of whole groups give the same bits.
_ROWS = 64


class QuantizedLinear(nn.Module):
    """y = W x + b with W (out, in) held as MatMulNBits stores it and dequantized when used.

    A large matrix is dequantized some rows at a time, and again on the way back.

    Inputs are read in floats; within `level4_inputs` they are rounded as ONNX Runtime's accuracy level 4 does.

    Args:
        matrix: The packed matrix, (out, in).
        bias: (out,) or None.

    Attributes:
        reads_floats: The exported product reads floats whatever the accuracy level of the others, and so does this one.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.rounds_inputs = self.reads_floats = False
        self.spec = matrix.spec
        self.in_features = matrix.columns
        self.out_features = matrix.codes.shape[0]
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("zero_points", matrix.zero_points)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def empty(cls, rows: int, columns: int, spec: QuantSpec, *, bias: bool) -> QuantizedLinear:
        """Return a module of the right shapes on the meta device, to be filled by load_state_dict."""
        return cls(empty_matrix(rows, columns, spec), torch.empty(rows, device="meta") if bias else None)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix (out, in)."""
        return dequantize(self.codes, self.scales, self.zero_points, self.in_features, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds_inputs and not self.reads_floats:
            x = int8_inputs(x, self.spec)
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return W x + bias (..., out) of inputs (..., in) as they are, to be differentiated."""
        rows = max(_ROWS, TOGETHER // self.in_features // _ROWS * _ROWS)
        begins = range(0, self.out_features, rows)
        if len(begins) == 1:
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        if not torch.is_grad_enabled():
            return torch.cat([self._rows(x, bias, slice(begin, begin + rows)) for begin in begins], -1)
        parts = [
            checkpoint(self._rows, x, bias, slice(begin, begin + rows), use_reentrant=False)
            for begin in begins
        ]
        return torch.cat(parts, -1)

    def _rows(self, x: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        """Return the outputs of some rows of the matrix."""
        zero_points = None if self.zero_points is None else self.zero_points[rows]
        part = dequantize(self.codes[rows], self.scales[rows], zero_points, self.in_features, self.spec)
        return nn.functional.linear(x, part.to(x.dtype), None if bias is None else bias[rows])

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}"


class CorrectedLinear(nn.Module):
    """y = Q x + B A x + b: a quantized matrix and a float branch of low rank that corrects its error.

    Args:
        quantized: Q with the bias.
        down: A, a linear module (in -> r) without bias.
        up: B, a linear module (r -> out) without bias.
    """

    def __init__(self, quantized: QuantizedLinear, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.quantized, self.down, self.up = quantized, down, up
        self.in_features, self.out_features = quantized.in_features, quantized.out_features

    @property
    def weight(self) -> Tensor:
        """The matrix that the module multiplies by (out, in)."""
        return self.quantized.weight + self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.quantized(x) + self.up(self.down(x))
        return y


class Int8Linear(nn.Module):
    """y = W x + b with W (out, in) and x both rounded to int8, as the exported graph computes it.

    Gradients pass as though the inputs were not rounded.

    Args:
        matrix: The matrix in int8, (out, in).
        bias: (out,) or None.
    """

    codes: Tensor
    scales: Tensor
    spec = W8A8

    def __init__(self, matrix: Int8Matrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.codes.shape
        self.rounds_inputs = True
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def empty(cls, rows: int, columns: int, *, bias: bool) -> Int8Linear:
        """Return a module of the right shapes on the meta device, to be filled by load_state_dict."""
        matrix = Int8Matrix(
            torch.empty(rows, columns, dtype=torch.int8, device="meta"), torch.empty(rows, device="meta")
        )
        return cls(matrix, torch.empty(rows, device="meta") if bias else None)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix (out, in)."""
        return Int8Matrix(self.codes, self.scales).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounds_inputs:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        y = int8_product(x, self.codes, self.scales).to(x.dtype)
        if x.requires_grad:
            smooth = nn.functional.linear(x, self.weight.to(x.dtype))
            y = smooth + (y - smooth).detach()
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8 with int8 inputs"


@contextmanager
def float_inputs(model: nn.Module) -> Iterator[None]:
    """Let the int8 modules of a model read their inputs in floats, as a graph does at accuracy level 0."""
    with _rounding_inputs(model, Int8Linear, False):
        yield


@contextmanager
def level4_inputs(model: nn.Module) -> Iterator[None]:
    """Let the quantized matrices of a model round their inputs to int8, as a graph does at accuracy level 4."""
    with _rounding_inputs(model, QuantizedLinear, True):
        yield


@contextmanager
def _rounding_inputs(
    model: nn.Module, kind: type[QuantizedLinear | Int8Linear], rounds: bool
) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, kind)]
    before = [module.rounds_inputs for module in modules]
    for module in modules:
        module.rounds_inputs = rounds
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.rounds_inputs = value


class QuantizedEmbedding(nn.Module):
    """Rows of a quantized table (vocabulary, dim); only the rows looked up are dequantized."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, multiplier: float = 1.0) -> None:
        super().__init__()
        self.spec = matrix.spec
        self.multiplier = multiplier
        self.embedding_dim = matrix.columns
        self.num_embeddings = matrix.codes.shape[0]
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("zero_points", matrix.zero_points)

    @classmethod
    def empty(cls, rows: int, columns: int, spec: QuantSpec, multiplier: float = 1.0) -> QuantizedEmbedding:
        """Return a module of the right shapes on the meta device."""
        return cls(empty_matrix(rows, columns, spec), multiplier)

    @property
    def weight(self) -> Tensor:
        """The dequantized table (vocabulary, dim)."""
        return dequantize(self.codes, self.scales, self.zero_points, self.embedding_dim, self.spec)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = input_ids.flatten()
        zero_points = None if self.zero_points is None else self.zero_points[rows]
        values = dequantize(self.codes[rows], self.scales[rows], zero_points, self.embedding_dim, self.spec)
        return values.view(*input_ids.shape, -1) * self.multiplier


def empty_matrix(rows: int, columns: int, spec: QuantSpec) -> QuantizedMatrix:
    """Return a packed matrix of the right shapes on the meta device."""
    blocks = -(-columns // spec.block_size)
    return QuantizedMatrix(
        codes=torch.empty(rows, blocks, spec.block_size * spec.bits // 8, dtype=torch.uint8, device="meta"),
        scales=torch.empty(rows, blocks, device="meta"),
        zero_points=None
        if spec.symmetric
        else torch.empty(rows, -(-blocks * spec.bits // 8), dtype=torch.uint8, device="meta"),
        columns=columns,
        spec=spec,
    )


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear module over existing tensors: weight (out, in), bias (out,) or None."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


class RotatedHead(nn.Module):
    """logits = head(rotation(x)): the head of a model whose residual stream is rotated and whose table is tied.

    The rotation undoes the residual's, applies the final norm's gain and rotates again, so that one table
    serves the embedding and the head.

    Args:
        rotation: A linear module (d -> d) without bias.
        head: The output projection (d -> vocabulary) on the embedding's table.
    """

    def __init__(self, rotation: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.rotation = rotation
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rotation(x))
        return logits
