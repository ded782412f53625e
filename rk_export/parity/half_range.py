"""Whether a model fits into fp16: its largest weights, and its largest values on the probe."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rk_export.errors import InputError

logger = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float16).max
# Other texts reach further than the probe does: within this factor of the end of the range, that is said. SmolLM2-135M,
# whose fp16 graphs are fine, reaches 24,400.
_MARGIN = 2.0
_FIX = "export for the CPU provider, whose graphs are in fp32: --ep cpu"


class Peaks:
    """The largest absolute value by place: weights, and what enters and leaves every module of a layer.

    The residual stream is what enters a norm, the product of gate and up what enters the down matrix.
    """

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def note(self, place: str, tensor: Tensor) -> None:
        """Note a tensor's largest value; what is not a number counts as infinite."""
        peak = float(tensor.abs().max()) if tensor.numel() else 0.0
        peak = math.inf if math.isnan(peak) else peak
        self.largest[place] = max(peak, self.largest.get(place, 0.0))

    @contextmanager
    def recording(self, layer: nn.Module, name: str) -> Iterator[None]:
        """Note the weights of a layer, and what passes through its modules in the meantime."""
        for path, parameter in layer.named_parameters():
            self.note(f"{name}, weight {path}", parameter)
        leaves = [(path, module) for path, module in layer.named_modules() if not any(module.children())]
        handles = [
            module.register_forward_hook(self._hook(f"{name}, {path}")) for path, module in leaves if path
        ]
        handles.append(layer.register_forward_hook(self._hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, place: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # What follows the first value of a module is no activation: masks, positions, weights of attention.
            for what, values in (("input", inputs), ("output", output)):
                first = values[0] if isinstance(values, tuple) and values else values
                if isinstance(first, Tensor) and first.is_floating_point():
                    self.note(f"{place}, {what}", first)

        return note


def check_half_range(peaks: Peaks, where: str) -> tuple[str, ...]:
    """Refuse an fp16 graph that would overflow, before it is built.

    Args:
        peaks: Of the dense model on the probe.
        where: The model, for the message.

    Returns:
        A notice where the largest value comes close to the end of the range.

    Raises:
        InputError: Names the first place in the order of the computation whose values do not fit.
    """
    beyond = [(place, peak) for place, peak in peaks.largest.items() if peak > LARGEST]
    if beyond:
        place, peak = beyond[0]
        worst = max(peaks.largest.values())
        more = f" ({len(beyond)} places in all, up to {worst:.3g})" if len(beyond) > 1 else ""
        raise InputError(
            f"{place} reaches {peak:.3g}, an fp16 graph ends at {LARGEST:.0f}{more}", where=where, fix=_FIX
        )
    place, peak = max(peaks.largest.items(), key=lambda item: item[1])
    if peak * _MARGIN <= LARGEST:
        return ()
    notice = (
        f"{place} reaches {peak:.3g} on the probe, an fp16 graph ends at {LARGEST:.0f}: "
        f"other texts may overflow; {_FIX}"
    )
    logger.warning("%s", notice)
    return (notice,)
