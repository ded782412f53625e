"""The KV cache of one batch, kept in ONNX Runtime values and handed over by IO binding."""

from __future__ import annotations

from typing import Any, Protocol

import onnxruntime as ort

from rk_export.runtime.layout import DecoderLayout

_ROUND_TO = 64


class Cache(Protocol):
    """Where the keys and values of past positions live between the runs of a graph."""

    def bind(self, binding: Any) -> None:
        """Bind an empty past and the present: before the first run as the binding's first outputs, or to start anew."""

    def advance(self, binding: Any) -> None:
        """Make the present of the last run the past of the next."""


class SharedCache:
    """One preallocated buffer per slot, bound as past and present: a run appends in place, nothing is copied.

    Args:
        layout: The graph's inputs and outputs.
        batch: Rows.
        capacity: Positions to make room for; rounded up to a multiple of 64.
        device: ``cpu`` or ``cuda``, where the buffers are allocated.
    """

    def __init__(self, layout: DecoderLayout, *, batch: int, capacity: int, device: str) -> None:
        positions = -(-capacity // _ROUND_TO) * _ROUND_TO
        self._buffers = [
            (
                slot,
                ort.OrtValue.ortvalue_from_shape_and_type(
                    [batch, slot.kv_heads, positions, slot.head_size], layout.cache_dtype.type, device, 0
                ),
            )
            for slot in layout.slots
        ]

    def bind(self, binding: Any) -> None:
        """Bind every buffer twice; the bindings hold for all runs, and a run of a whole text starts anew."""
        for slot, buffer in self._buffers:
            binding.bind_ortvalue_input(slot.past, buffer)
            binding.bind_ortvalue_output(slot.present, buffer)

    def advance(self, binding: Any) -> None:
        """Do nothing: the run has already written into the buffers."""


class GrowingCache:
    """Ordinary past and present: every run allocates a present one step longer than its past.

    For graphs whose attention is not a ``GroupQueryAttention``.

    Args:
        layout: The graph's inputs and outputs.
        batch: Rows.
        device: ``cpu`` or ``cuda``, where present values stay.
    """

    def __init__(self, layout: DecoderLayout, *, batch: int, device: str) -> None:
        self._layout, self._batch, self._device = layout, batch, device

    def bind(self, binding: Any) -> None:
        """Bind an empty past, and let ONNX Runtime allocate the present."""
        for slot, empty in zip(self._layout.slots, self._layout.empty_past(self._batch), strict=True):
            binding.bind_cpu_input(slot.past, empty)
            binding.bind_output(slot.present, self._device)

    def advance(self, binding: Any) -> None:
        """Bind the present values as past, and ask for new ones."""
        for slot, present in zip(self._layout.slots, binding.get_outputs(), strict=False):
            binding.bind_ortvalue_input(slot.past, present)
            binding.bind_output(slot.present, self._device)
