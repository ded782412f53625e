"""What a training of large matrices keeps on disk: the matrices, their gradients, and the optimizer's moments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rk_export.report.humanize import size
from rk_export.scratch import SMALLEST, writable, zeros

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class OnDisk:
    """The large matrices among trained tensors, moved to the disk in place; on other devices they stay where they are.

    A gradient goes there as soon as it is complete. No value differs from what it would be in memory.

    Args:
        trained: By name, float32.
    """

    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        # Vectors are small, and may be shortened while they are trained.
        self._large = {
            name: tensor
            for name, tensor in trained.items()
            if tensor.device.type == "cpu" and tensor.ndim > 1 and tensor.nbytes >= SMALLEST
        }
        values = writable({name: tensor.data for name, tensor in self._large.items()})
        self._moments = {
            name: [zeros(tensor.shape) for _ in _MOMENTS] for name, tensor in self._large.items()
        }
        self._hooks = []
        for name, tensor in self._large.items():
            tensor.data = values[name]
            move = _moved_to(zeros(tensor.shape))
            hook = tensor.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        if self._large:
            taken = 4 * sum(tensor.nbytes for tensor in self._large.values())
            logger.info("values, gradients and moments of what is trained take %s of disk", size(taken))

    def keep_moments(self, optimizer: torch.optim.AdamW) -> None:
        """Have an optimizer keep on disk the moments that it has or begins with."""
        for name, tensor in self._large.items():
            state: dict[str, Any] = optimizer.state[tensor]
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
            for kind, place in zip(_MOMENTS, self._moments[name], strict=True):
                if kind in state:
                    place.copy_(state[kind])
                state[kind] = place

    def release(self) -> None:
        """Leave gradients where they come from now on."""
        for hook in self._hooks:
            hook.remove()


def _moved_to(place: Tensor) -> Callable[[Tensor], None]:
    def move(tensor: Tensor) -> None:
        if tensor.grad is not None and tensor.grad is not place:
            place.copy_(tensor.grad)
            tensor.grad = place

    return move
