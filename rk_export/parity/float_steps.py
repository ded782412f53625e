"""What single precision alone costs a model: the outputs of its modules are moved by one float32 step each.

Two exact computations of one model, in another basis or with sums in another order, differ by rounding at every step.
How far that carries depends on the model: large gains saturate the attention, massive activations cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Exact computations of one model may differ by so many times what one float32 step in every module does.
ROUNDING_FACTOR = 8.0
_STEP = torch.finfo(torch.float32).eps


def float32_step(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return values (..., width), each moved by noise of one float32 step of its vector's root mean square."""
    step = _STEP * values.float().square().mean(-1, keepdim=True).sqrt()
    noise = torch.randn(values.shape, generator=generator).to(values.device)
    return values + (step * noise).to(values.dtype)


@contextmanager
def shaking_outputs(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Shake what every module without children returns: projections, norms, activations, embeddings.

    Args:
        model: A layer or a whole model.
        generator: Of the noise, on the CPU.
    """

    def shake(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        is_float = isinstance(output, Tensor) and output.is_floating_point()
        return float32_step(output, generator) if is_float else output

    handles = [
        module.register_forward_hook(shake) for module in model.modules() if not any(module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
