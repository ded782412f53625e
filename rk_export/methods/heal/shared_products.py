"""Factor pairs in training: what the members of a group have in common is computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rk_export.passes.modules.factors import IdentityFactors, JointFactors


@contextmanager
def shared_products(model: nn.Module) -> Iterator[None]:
    """Inside, members that read the same tensor share the down-projection and all that follows from it.

    Outputs and gradients are those of the modules themselves.
    """
    pairs: list[Any] = [
        module for module in model.modules() if isinstance(module, JointFactors | IdentityFactors)
    ]
    for pair in pairs:
        pair.member = _Members(_identity if isinstance(pair, IdentityFactors) else _joint, pair)
    try:
        yield
    finally:
        for pair in pairs:
            del pair.member


class _Members:
    """Outputs of all members for the input that was read last, until each has been asked for."""

    def __init__(self, outputs: Callable[[Any, Tensor], dict[str, Tensor]], pair: nn.Module) -> None:
        self._outputs, self._pair = outputs, pair
        self._x: Tensor | None = None
        self._y: dict[str, Tensor] = {}

    def __call__(self, role: str, x: Tensor) -> Tensor:
        if self._x is not x or role not in self._y:
            self._x, self._y = x, self._outputs(self._pair, x)
        output = self._y.pop(role)
        if not self._y:
            self._x = None
        return output


def _joint(pair: JointFactors, x: Tensor) -> dict[str, Tensor]:
    z = pair.down(x)
    return {role: up(z) for role, up in pair.ups.items()}


def _identity(pair: IdentityFactors, x: Tensor) -> dict[str, Tensor]:
    z = pair.down(x)
    roles = [name.removeprefix("order_") for name, _ in pair.named_buffers(recurse=False)]
    orders = [pair.order(role) for role in roles]
    stacked = torch.cat([z, pair.ups["rest"](z)], dim=-1)
    permuted: Tensor = _Permuted.apply(stacked, torch.cat(orders))  # type: ignore[no-untyped-call]
    parts = torch.split(permuted, [len(order) for order in orders], dim=-1)
    biases = [pair.bias(role) for role in roles]
    return {
        role: part if bias is None else part + bias
        for role, part, bias in zip(roles, parts, biases, strict=True)
    }


class _Permuted(torch.autograd.Function):
    """Features in another order; the gradient is gathered too, which is faster than to scatter it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.inverse = torch.argsort(order)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(-1, ctx.inverse), None
