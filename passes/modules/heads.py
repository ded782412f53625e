"""Projections whose heads or head dimensions were pruned, padded to and sliced from what attention expects."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


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
