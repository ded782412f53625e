"""A linear layer in its singular directions: coefficients and new bases are trained (2405.15877)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rk_export.passes.numerics.basis import MEMORY, PairSize, directions, folded
from rk_export.passes.numerics.metric import Metric
from rk_export.scratch import laid_down
from rk_export.training.loop import root_mean_square


class BasisLinear(nn.Module):
    """y = U diag(w²) V x + U_add V_add x + b, equal at first to the linear layer that it replaces.

    U and V, the singular directions, lie on disk, and are frozen until `thaw`. w starts as the root of the singular
    values, U_add at zero, V_add is random: normal over the root of its rank.

    Args:
        linear: The dense layer, weight (out, in).
        new_basis: Rank r of the new bases, at least 0.
        generator: Of V_add, on the CPU.
        dtype: Float type of the products with U and V while they are frozen; the type of everything else is that
            of the layer.
        inputs: Metric of what the layer reads, for whitened directions; None for plain ones.

    Attributes:
        scale: Root mean square of the dense weights.
        coefficients: w (k,).
        kept: Which of the first directions are left (k,), ascending.
        first: Weighted sum over steps of e (k,), with e = s dL/ds the loss' change per relative change of a
            coefficient s = w².
        second: The same sum of e².
        absolute: The same sum of |e|.
    """

    def __init__(
        self,
        linear: nn.Linear,
        new_basis: int,
        generator: torch.Generator,
        dtype: torch.dtype,
        inputs: Metric | None = None,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        found = directions(weight, inputs)
        count = len(found.values)
        self.size = PairSize(linear.out_features, linear.in_features, new_basis)
        self.scale = root_mean_square(weight)
        self._dtype = dtype
        self.left = nn.Parameter(laid_down(found.left), requires_grad=False)
        self.right = nn.Parameter(laid_down(found.right), requires_grad=False)
        self.coefficients = nn.Parameter(found.values.sqrt())
        random = torch.randn(new_basis, linear.in_features, generator=generator)
        self.left_add = nn.Parameter(laid_down(weight.new_zeros(linear.out_features, new_basis)))
        self.right_add = nn.Parameter(laid_down((random / max(new_basis, 1) ** 0.5).to(weight)))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.kept = torch.arange(count, device=weight.device)
        self.first, self.second, self.absolute = (weight.new_zeros(count) for _ in range(3))
        self._set_fast()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        left, right = self._fast or (self.left, self.right)
        z = nn.functional.linear(x, right) * self.coefficients.square()
        y = nn.functional.linear(z, left, self.bias)
        if self.size.extra:
            y = y + nn.functional.linear(nn.functional.linear(x, self.right_add), self.left_add)
        return y

    def trained(self) -> dict[str, Tensor]:
        """Return the tensors that are trained, by name."""
        return {name: item for name, item in self.named_parameters() if item.requires_grad}

    @torch.no_grad()
    def observe(self) -> None:
        """Add a step's gradient to the evidence; earlier steps count less and less.

        With s = w² one has w dL/dw = 2 s dL/ds, so that a coefficient near zero makes no division by it.
        """
        if self.coefficients.grad is None:
            raise ValueError("no gradient has been computed")
        change = 0.5 * self.coefficients * self.coefficients.grad
        self.first.mul_(MEMORY).add_(change)
        self.second.mul_(MEMORY).add_(change.square())
        self.absolute.mul_(MEMORY).add_(change.abs())

    @torch.no_grad()
    def keep(self, index: Tensor) -> None:
        """Drop all directions but some.

        Args:
            index: Positions among the directions that are left, ascending.
        """
        self.kept = self.kept[index]
        self.first, self.second, self.absolute = (
            item[index] for item in (self.first, self.second, self.absolute)
        )
        self.coefficients.grad = None
        self.coefficients.data = self.coefficients.data[index]
        self.left.data = laid_down(self.left.data[:, index].contiguous())
        self.right.data = laid_down(self.right.data[index].contiguous())
        self._set_fast()

    def thaw(self) -> None:
        """Let U and V be trained too."""
        self.left.requires_grad_(True)
        self.right.requires_grad_(True)
        self._set_fast()

    @torch.no_grad()
    def folded(self) -> Tensor:
        """Return W' = U diag(w²) V + U_add V_add (out, in) in float64."""
        return folded(
            self.left, self.coefficients.double().square(), self.right, self.left_add, self.right_add
        )

    def _set_fast(self) -> None:
        """Keep frozen U and V in bfloat16 where products are, so that no step has to convert them."""
        self._fast: tuple[Tensor, Tensor] | None = None
        if self._dtype is torch.bfloat16 and not self.left.requires_grad:
            left, right = self.left.detach().to(self._dtype), self.right.detach().to(self._dtype)
            self._fast = laid_down(left), laid_down(right)
