"""What layers without attention carry, a row for each slot, beside the keys and values of the slots.

A run reads the states of its slots and writes new ones elsewhere, for a kernel may read what it has overwritten; they
are then put in place. Slots that a run does not touch keep theirs. A state is that of the last token of its slot, and
nothing leads back from it, so whoever wants to return to a position keeps a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from rk_export.runtime.engine.device_copy import Copier
from rk_export.runtime.layout import DecoderLayout

State = tuple[np.ndarray, ...]


class StateSlots:
    """The states of all slots.

    Args:
        layout: The graph's inputs and outputs.
        slots: Sequences.
        device: ``cpu`` or ``cuda``, where the states lie.
        copier: Copies between places of a device; None on the CPU.
    """

    def __init__(self, layout: DecoderLayout, *, slots: int, device: str, copier: Copier | None) -> None:
        self._states, self._device, self._copier = layout.states, device, copier
        self._dtype = layout.cache_dtype
        shapes = [(slots, *state.shape) for state in layout.states]
        if copier is None:
            self._read, self._written = ([np.zeros(shape, self._dtype) for shape in shapes] for _ in range(2))
        else:
            self._on_device = [[_allocated(shape, self._dtype, device) for shape in shapes] for _ in range(2)]

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Bind the states of the slots [first, first + count) as past, and where their new ones go."""
        for index, state in enumerate(self._states):
            shape = [count, *state.shape]
            places = (state.past, 0, binding.bind_input), (state.present, 1, binding.bind_output)
            for name, kind, bind in places:
                place = self._address(kind, index, first)
                bind(name, self._device, 0, self._dtype.type, shape, place)

    def settle(self, first: int, count: int) -> None:
        """Put in place what a run has written."""
        if self._copier is None:
            for read, written in zip(self._read, self._written, strict=True):
                read[first : first + count] = written[first : first + count]
            return
        for index, state in enumerate(self._states):
            source, target = (self._address(kind, index, first) for kind in (1, 0))
            self._copier.copy(_three(count, state.shape), source, target)

    def copy(self, source: int, target: int) -> None:
        """Copy the state of a slot over that of another."""
        if self._copier is None:
            for read in self._read:
                read[target] = read[source]
            return
        for index, state in enumerate(self._states):
            self._copier.copy(
                _three(1, state.shape), self._address(0, index, source), self._address(0, index, target)
            )

    def clear(self, slot: int) -> None:
        """Give a slot the state of no token."""
        self.write(slot, tuple(np.zeros(state.shape, self._dtype) for state in self._states))

    def read(self, slot: int) -> State:
        """Return a copy of the state of a slot."""
        if self._copier is None:
            return tuple(read[slot].copy() for read in self._read)
        copier = self._copier
        return tuple(
            copier.fetch(_three(1, state.shape), self._address(0, index, slot)).reshape(state.shape)
            for index, state in enumerate(self._states)
        )

    def write(self, slot: int, state: State) -> None:
        """Give a slot a state."""
        if self._copier is None:
            for read, value in zip(self._read, state, strict=True):
                read[slot] = value
            return
        for index, (value, item) in enumerate(zip(state, self._states, strict=True)):
            self._copier.put(value.reshape(_three(1, item.shape)), self._address(0, index, slot))

    def _address(self, kind: int, index: int, slot: int) -> int:
        """Return where the state of a slot begins: what is read (0), or what is written (1)."""
        if self._copier is None:
            return int((self._read, self._written)[kind][index][slot:].ctypes.data)
        size = int(np.prod(self._states[index].shape)) * self._dtype.itemsize
        return int(self._on_device[kind][index].data_ptr()) + slot * size


def _three(count: int, shape: Sequence[int]) -> tuple[int, int, int]:
    return count, 1, int(np.prod(shape))


def _allocated(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
