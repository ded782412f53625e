"""The modules that passes put into a PyTorch model: factor pairs and quantized matrices.

A rewritten model stays a model: it evaluates, saves and loads. The members of a joint group keep their
places (`q_proj`, `k_proj`) and share the factors, which are registered once beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rk_export.options import QuantSpec
from rk_export.passes.numerics.quantize import QuantizedMatrix, dequantize


class QuantizedLinear(nn.Module):
    """y = W x + b with W (out, in) held as MatMulNBits stores it and dequantized when used.

    Args:
        matrix: The packed matrix, (out, in).
        bias: (out,) or None.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
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
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}"


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


class JointFactors(nn.Module):
    """y_i = B_i A x + b_i for matrices that share their input (2402.16319).

    Args:
        down: A, a linear module (in -> k) without bias.
        ups: B_i by role, linear modules (k -> out_i) that carry the biases.
    """

    def __init__(self, down: nn.Module, ups: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.down = down
        self.ups = nn.ModuleDict(ups)

    def member(self, role: str, x: Tensor) -> Tensor:
        """Return y of one member, (..., out_i)."""
        output: Tensor = self.ups[role](self.down(x))
        return output

    @property
    def rank(self) -> int:
        """The inner dimension k."""
        return int(self.down.out_features)  # type: ignore[arg-type]

    def pairs(self) -> Iterator[JointFactors]:
        """Yield the factor pairs: this one."""
        yield self


class GroupedFactors(nn.Module):
    """One factor pair per KV group; the outputs of a member stand side by side (2402.16319, QK per head)."""

    def __init__(self, groups: list[JointFactors]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def member(self, role: str, x: Tensor) -> Tensor:
        """Return y of one member, (..., out_i), heads in their original order."""
        return torch.cat([pair.member(role, x) for pair in self.pairs()], dim=-1)

    def pairs(self) -> Iterator[JointFactors]:
        """Yield the factor pairs in the order of the KV groups."""
        for pair in self.groups:
            assert isinstance(pair, JointFactors)
            yield pair


class JointMember(nn.Module):
    """Stands where a member's linear layer stood and reads its share of the factors.

    The factors are owned by the parent module, so this holds them outside the module tree: their tensors
    appear once in the state dict.
    """

    def __init__(self, factors: JointFactors | GroupedFactors, role: str) -> None:
        super().__init__()
        self.role = role
        self._factors = (factors,)

    @property
    def factors(self) -> JointFactors | GroupedFactors:
        """The shared factors."""
        return self._factors[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.factors.member(self.role, x)
