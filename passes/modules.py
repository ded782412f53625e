"""The modules that passes put into a PyTorch model: factor pairs and quantized matrices.

A rewritten model stays a model: it evaluates, saves and loads. The members of a joint group keep their
places (`q_proj`, `k_proj`) and share the factors, which are registered once beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rk_export.options import W8A8, QuantSpec
from rk_export.passes.numerics.int8 import Int8Matrix, int8_product
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
    modules = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for module in modules:
        module.rounds_inputs = False
    try:
        yield
    finally:
        for module in modules:
            module.rounds_inputs = True


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


class IdentityFactors(nn.Module):
    """z = D x, y = [z; C z] in the members' order, plus biases: some outputs are z themselves (2501.19090).

    Args:
        down: D, the pivot rows, a linear module (in -> k) without bias.
        rest: C, the coefficients of all other rows, a linear module (k -> sum of out_i - k) without bias.
        orders: By role, where in [z; C z] each output of the member stands, integers (out_i,).
        biases: By role, (out_i,) or None.
    """

    def __init__(
        self,
        down: nn.Module,
        rest: nn.Module,
        orders: Mapping[str, Tensor],
        biases: Mapping[str, Tensor | None],
    ) -> None:
        super().__init__()
        self.down = down
        self.ups = nn.ModuleDict({"rest": rest})
        self.roles = tuple(orders)
        for role, order in orders.items():
            self.register_buffer(f"order_{role}", order.to(torch.int32))
            bias = biases[role]
            parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            self.register_parameter(f"bias_{role}", parameter)

    def order(self, role: str) -> Tensor:
        """Where in [z; C z] each output of a member stands, int32 (out_i,)."""
        order: Tensor = getattr(self, f"order_{role}")
        return order

    def bias(self, role: str) -> Tensor | None:
        """The bias of a member, (out_i,), or None."""
        bias: Tensor | None = getattr(self, f"bias_{role}")
        return bias

    def member(self, role: str, x: Tensor) -> Tensor:
        """Return y of one member, (..., out_i)."""
        z = self.down(x)
        y = torch.cat([z, self.ups["rest"](z)], dim=-1).index_select(-1, self.order(role))
        bias = self.bias(role)
        return y if bias is None else y + bias

    def runs(self, role: str) -> list[tuple[int, int]]:
        """The stretches (start, end) of [z; C z] that make up a member, cut where C z begins."""
        runs: list[tuple[int, int]] = []
        for place in self.order(role).tolist():
            if runs and place == runs[-1][1] and place != self.rank:
                runs[-1] = (runs[-1][0], place + 1)
            else:
                runs.append((place, place + 1))
        return runs

    @property
    def rank(self) -> int:
        """The inner dimension k."""
        return int(self.down.out_features)  # type: ignore[arg-type]

    def pairs(self) -> Iterator[IdentityFactors]:
        """Yield the factor pairs: this one."""
        yield self


SharedFactors = JointFactors | GroupedFactors | IdentityFactors


class JointMember(nn.Module):
    """Stands where a member's linear layer stood and reads its share of the factors.

    The factors are owned by the parent module, so this holds them outside the module tree: their tensors
    appear once in the state dict.
    """

    def __init__(self, factors: SharedFactors, role: str) -> None:
        super().__init__()
        self.role = role
        self._factors = (factors,)

    @property
    def factors(self) -> SharedFactors:
        """The shared factors."""
        return self._factors[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.factors.member(self.role, x)


@dataclass(frozen=True)
class HeadSlots:
    """Where reduced heads stand among the heads that attention was built for.

    Args:
        heads: Heads that are there; they take the first places.
        width: Width of each.
        all_heads: Heads that attention counts.
        head_dim: Width that attention gives each.
    """

    heads: int
    width: int
    all_heads: int
    head_dim: int


class PaddedHeads(nn.Module):
    """The heads of a linear module, with zeros for the heads and the dimensions that were pruned.

    Args:
        linear: Maps (..., in) to (..., heads * width); dense, quantized or a `JointMember`.
        slots: Where the heads stand.
    """

    def __init__(self, linear: nn.Module, slots: HeadSlots) -> None:
        super().__init__()
        self.linear, self.slots = linear, slots

    def forward(self, x: Tensor) -> Tensor:
        slots = self.slots
        y: Tensor = self.linear(x)
        heads = y.view(*y.shape[:-1], slots.heads, slots.width)
        missing = (0, slots.head_dim - slots.width, 0, slots.all_heads - slots.heads)
        return nn.functional.pad(heads, missing).flatten(-2)


class SlicedHeads(nn.Module):
    """A linear module that reads the heads and the dimensions that were not pruned.

    Args:
        linear: Maps (..., heads * width) to (..., out); dense, quantized or a `JointMember`.
        slots: Where the heads stand.
    """

    def __init__(self, linear: nn.Module, slots: HeadSlots) -> None:
        super().__init__()
        self.linear, self.slots = linear, slots

    def forward(self, x: Tensor) -> Tensor:
        slots = self.slots
        heads = x.reshape(*x.shape[:-1], slots.all_heads, slots.head_dim)
        y: Tensor = self.linear(heads[..., : slots.heads, : slots.width].flatten(-2))
        return y


def without_slots(module: nn.Module) -> nn.Module:
    """Return the module inside the padding or slicing of reduced heads, or the module itself."""
    return module.linear if isinstance(module, PaddedHeads | SlicedHeads) else module


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
