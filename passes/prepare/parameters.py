"""Reading and replacing the parameters of linear modules, norms and routers."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def read(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a parameter's values, or None where the module has none of that name."""
    value = cast(Tensor | None, getattr(module, name, None))
    return None if value is None else value.detach()


def weight(module: nn.Module) -> Tensor:
    """Return the weight: (out, in) of a matrix, (d,) of a norm."""
    value = read(module)
    if value is None:
        raise TypeError(f"{type(module).__name__} has no weight")
    return value


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by new values in its own dtype; who shared the old one keeps it."""
    old = cast(Tensor, getattr(module, name))
    setattr(module, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=False))
