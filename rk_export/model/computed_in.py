"""A model that computes in another float type than its tensors are stored in, a module at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rk_export.passes.modules.quantized import QuantizedEmbedding


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have each module of a model convert its own float tensors to a type while it runs, inside this context.

    The model computes what a copy of it in that type computes, and no such copy stands in memory. Modules must read
    each other's tensors by calling each other.

    Args:
        model: Any model; its tensors are its own again after each call.
        dtype: A float type.
    """
    held: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def convert(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        other = [tensor for tensor in own if tensor.is_floating_point() and tensor.dtype is not dtype]
        held[module] = [(tensor, tensor.data) for tensor in other]
        for tensor in other:
            tensor.data = tensor.data.to(dtype)

    def restore(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        for tensor, data in held.pop(module, ()):
            tensor.data = data
        # Rows of a quantized table are made in float32, whatever its scales are.
        return output.to(dtype) if isinstance(module, QuantizedEmbedding) else output

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(convert))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
