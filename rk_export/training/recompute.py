"""Layers in training whose activations are not kept: each layer computes its own again when its gradients are taken.

What stays until then is what every layer read, and that lies on disk. So memory holds one layer's activations,
whatever the depth; outputs and gradients are those of the layers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rk_export.scratch import laid_down


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Run layers inside without keeping their activations; the way back may lie outside.

    Args:
        layers: In evaluation mode, so that they draw nothing at random.
    """
    inside = list(layers)
    for layer in inside:
        layer.forward = _forgetful(layer.forward)
    try:
        with saved_tensors_hooks(laid_down, _as_laid_down):
            yield
    finally:
        for layer in inside:
            del layer.forward


def _forgetful(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        torch.clear_autocast_cache()  # or it holds the weights of all layers
        return output

    return run


def _as_laid_down(tensor: Tensor) -> Tensor:
    return tensor
