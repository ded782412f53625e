"""Low rank plus sparse in a PyTorch model (2505.03801): what stands where a linear layer stood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rk_export.passes.numerics.low_rank_plus_sparse import scattered


class SparseSum(nn.Module):
    """y = B A x + S x + b; without a factor pair y = S x + b.

    Args:
        linear: Computes B A x: a `JointMember` without bias; None for rank 0.
        shape: (out, in).
        indices: Places of S' entries, row * in + column, strictly ascending, integers (entries,).
        values: The entries (entries,).
        bias: (out,) or None.
    """

    indices: Tensor
    values: Tensor

    def __init__(
        self,
        linear: nn.Module | None,
        shape: tuple[int, int],
        indices: Tensor,
        values: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.linear = linear
        self.register_buffer("indices", indices)
        self.register_buffer("values", values)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def empty(
        cls, linear: nn.Module | None, shape: tuple[int, int], entries: int, *, bias: bool
    ) -> SparseSum:
        """Return a module of the right shapes on the meta device, to be filled by load_state_dict."""
        indices = torch.empty(entries, dtype=torch.int32, device="meta")
        values = torch.empty(entries, device="meta")
        return cls(linear, shape, indices, values, torch.empty(shape[0], device="meta") if bias else None)

    @property
    def sparse(self) -> Tensor:
        """S (out, in), with its zeros."""
        return scattered((self.out_features, self.in_features), self.indices, self.values)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.sparse.to(x.dtype), self.bias)
        return y if self.linear is None else y + self.linear(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {len(self.indices)} sparse entries"


def without_sparse(module: nn.Module) -> nn.Module:
    """Return the low rank inside a sum with a sparse matrix; the module itself where there is none."""
    inside = module.linear if isinstance(module, SparseSum) else module
    return module if inside is None else inside
