"""The KV cache of one batch, kept in ONNX Runtime values and handed over by IO binding."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from rk_export.runtime.layout import DecoderLayout

_ROUND_TO = 64


class Cache(Protocol):
    """Where the keys and values of past positions live between the runs of a graph."""

    def bind(self, binding: Any) -> None:
        """Bind an empty past and the present: before the first run as the binding's first outputs, or to start anew."""

    def advance(self, binding: Any) -> None:
        """Make the present of the last run the past of the next."""


class CarriedStates:
    """What layers without attention carry from run to run: a run reads one set of buffers and writes the other.

    Args:
        layout: The graph's inputs and outputs.
        batch: Rows.
        device: ``cpu`` or ``cuda``, where the buffers are allocated.
    """

    def __init__(self, layout: DecoderLayout, *, batch: int, device: str) -> None:
        self._states = layout.states
        self._zeros = [np.zeros((batch, *state.shape), layout.cache_dtype) for state in layout.states]
        self._read, self._written = (
            [_allocated(list(zeros.shape), layout, device) for zeros in self._zeros] for _ in range(2)
        )

    def bind(self, binding: Any) -> None:
        """Bind states of nothing, and where the first run is to write."""
        for buffer, zeros in zip(self._read, self._zeros, strict=True):
            buffer.update_inplace(zeros)
        self._bind(binding)

    def advance(self, binding: Any) -> None:
        """Bind what the last run wrote as what the next one reads."""
        if self._states:
            self._read, self._written = self._written, self._read
            self._bind(binding)

    def _bind(self, binding: Any) -> None:
        for state, read, written in zip(self._states, self._read, self._written, strict=True):
            binding.bind_ortvalue_input(state.past, read)
            binding.bind_ortvalue_output(state.present, written)


class SharedCache:
    """One preallocated buffer per slot, bound as past and present: a run appends in place, nothing is copied.

    States of layers without attention change places with a second set of buffers after each run.

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
                _allocated([batch, slot.kv_heads, positions, slot.head_size], layout, device),
            )
            for slot in layout.slots
        ]
        self._states = CarriedStates(layout, batch=batch, device=device)

    def bind(self, binding: Any) -> None:
        """Bind every buffer twice; the bindings hold for all runs, and a run of a whole text starts anew."""
        for slot, buffer in self._buffers:
            binding.bind_ortvalue_input(slot.past, buffer)
            binding.bind_ortvalue_output(slot.present, buffer)
        self._states.bind(binding)

    def advance(self, binding: Any) -> None:
        """Keys and values are in their buffers already; states become what the next run reads."""
        self._states.advance(binding)


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
        layout = self._layout
        for past, present, empty in zip(
            layout.pasts, layout.presents, layout.empty_past(self._batch), strict=True
        ):
            binding.bind_cpu_input(past, empty)
            binding.bind_output(present, self._device)

    def advance(self, binding: Any) -> None:
        """Bind the present values as past, and ask for new ones."""
        layout = self._layout
        for past, present, value in zip(layout.pasts, layout.presents, binding.get_outputs(), strict=False):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, self._device)


def _allocated(shape: list[int], layout: DecoderLayout, device: str) -> Any:
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, layout.cache_dtype.type, device, 0)
