"""Which tensors of a compressed model recovery trains: what compression made or left small, never a dense matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rk_export.model.architecture import Architecture
from rk_export.rewrite.apply import Rewritten
from rk_export.scratch import laid_down


@contextmanager
def trainable(rewritten: Rewritten, what: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Let the chosen tensors require gradients inside.

    Scales of quantized matrices are float32 inside and return to their stored type.

    Args:
        rewritten: The compressed model.
        what: Names from `TRAINABLE`.

    Yields:
        The tensors by their name in the state dict.
    """
    modules = dict(_inner_modules(rewritten.model, rewritten.architecture))
    quantized: list[Any] = [module for module in modules.values() if _scales(module) is not None]
    scaled = quantized if "scales" in what else []
    stored = [module.scales.dtype for module in scaled]
    for module in scaled:
        module.scales = laid_down(module.scales.detach().to(torch.float32, copy=True))
    chosen = {name: tensor for kind, name, tensor in _tensors(modules) if kind in what}
    for tensor in chosen.values():
        tensor.requires_grad_(True)
    try:
        yield chosen
    finally:
        for tensor in chosen.values():
            tensor.requires_grad_(False)
            tensor.grad = None
        for module, dtype in zip(scaled, stored, strict=True):
            module.scales = laid_down(module.scales.to(dtype))


def _inner_modules(model: nn.Module, architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of everything but the embedding and the head."""
    outer = [f"{path}." for path in (architecture.embedding, architecture.lm_head) if path]
    for name, module in model.named_modules():
        if not f"{name}.".startswith(tuple(outer)):
            yield name, module


def _tensors(modules: dict[str, nn.Module]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield kind, name and tensor of everything that may be trained."""
    pairs = tuple(f"{name}." for name, module in modules.items() if _is_factor_pair(module))
    for name, module in modules.items():
        scales = _scales(module)
        if scales is not None:
            yield "scales", f"{name}.scales", scales
        if isinstance(module, nn.Linear) and name.startswith(pairs):
            yield "factors", f"{name}.weight", module.weight
        has_matrix = scales is not None or isinstance(module, nn.Linear)
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                yield "biases" if has_matrix or name + "." in pairs else "norms", f"{name}.{leaf}", parameter


def _is_factor_pair(module: nn.Module) -> bool:
    return isinstance(getattr(module, "down", None), nn.Module) and hasattr(module, "ups")


def _scales(module: nn.Module) -> Tensor | None:
    """Return the scales of a quantized matrix, None for other modules."""
    scales = dict(module.named_buffers(recurse=False)).get("scales")
    return scales if hasattr(module, "codes") else None
