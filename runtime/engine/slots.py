"""One key-value buffer for many sequences, each in a slot of its own, and the runs of the graph over it.

A slot is filled from position 0 without gaps, so every row of a batch has the rotary positions that it has alone.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import onnxruntime as ort

from rk_export.runtime.decoder import position_ids
from rk_export.runtime.engine.device_copy import Copier
from rk_export.runtime.engine.state_slots import StateSlots
from rk_export.runtime.layout import LOGITS_START, DecoderLayout


class SlotBuffers:
    """Keys and values: one buffer [slots, kv_heads, capacity, head_size] for each side of each layer.

    Layers without attention have a state for each slot instead, see `StateSlots`; `states` is None where there are
    none.

    Args:
        layout: The graph's inputs and outputs.
        slots: Sequences.
        capacity: Positions of each.
        device: ``cpu`` or ``cuda``, where the buffers lie.
    """

    def __init__(self, layout: DecoderLayout, *, slots: int, capacity: int, device: str) -> None:
        self.slots, self.capacity = slots, capacity
        self._layout, self._device = layout, device
        shapes = [(slots, slot.kv_heads, capacity, slot.head_size) for slot in layout.slots]
        self._arrays = [lazy_zeros(shape, layout.cache_dtype) for shape in shapes] if device == "cpu" else []
        self._on_device = [] if device == "cpu" else [self._allocated(shape) for shape in shapes]
        self._copier = None if device == "cpu" else Copier(layout.cache_dtype, device)
        self.states: StateSlots | None = None
        if layout.states:
            self.states = StateSlots(layout, slots=slots, device=device, copier=self._copier)

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Bind the slots [first, first + count) as past and present: a run appends to them in place."""
        for index, slot in enumerate(self._layout.slots):
            place = self._address(index, first)
            shape = [count, slot.kv_heads, self.capacity, slot.head_size]
            for bind, name in ((binding.bind_input, slot.past), (binding.bind_output, slot.present)):
                bind(name, self._device, 0, self._layout.cache_dtype.type, shape, place)
        if self.states is not None:
            self.states.bind(binding, first, count)

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first positions of a slot over those of another, and the state of its last position."""
        if source == target or not positions:
            return
        for array in self._arrays:
            array[target, :, :positions] = array[source, :, :positions]
        if self._copier is not None:
            self._copy_on_device(self._copier, source, target)
        if self.states is not None:
            self.states.copy(source, target)

    def _address(self, index: int, slot: int) -> int:
        """Return where a slot begins; slots follow each other without gaps."""
        if self._arrays:
            return int(self._arrays[index][slot:].ctypes.data)
        shape = self._layout.slots[index]
        size = shape.kv_heads * self.capacity * shape.head_size * self._layout.cache_dtype.itemsize
        return int(self._on_device[index].data_ptr()) + slot * size

    def _allocated(self, shape: tuple[int, ...]) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), self._layout.cache_dtype.type, self._device, 0
        )

    def _copy_on_device(self, copier: Copier, source: int, target: int) -> None:
        """Copy whole slots."""
        for index, slot in enumerate(self._layout.slots):
            shape = [slot.kv_heads, self.capacity, slot.head_size]
            copier.copy(shape, self._address(index, source), self._address(index, target))


def lazy_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return zeros that take memory only where something was written, a small page at a time.

    With large pages the first token of a slot would touch nearly all of it: a stall of half a second, and the memory of
    the whole context.
    """
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


class SlotRunner:
    """Runs a decoder graph over slots.

    Args:
        session: An open ``onnxruntime.InferenceSession``; this object alone runs over these buffers.
        layout: Its inputs and outputs.
        buffers: The slots.
    """

    def __init__(self, session: Any, layout: DecoderLayout, buffers: SlotBuffers) -> None:
        self.buffers = buffers
        self._session, self._layout = session, layout
        # Two bindings: rows change seldom from step to step, and a prompt keeps its slot.
        self._prompts, self._rows = (_Bound(session.io_binding()) for _ in range(2))
        self._logits = np.empty((0, 1, 0), layout.logits_dtype)

    def extend(self, slot: int, tokens: np.ndarray, past: int, *, last: int = 1) -> np.ndarray:
        """Append tokens to one slot.

        Args:
            slot: The slot.
            tokens: [count], int64.
            past: Positions that the slot holds; what lies behind them is overwritten.
            last: Tokens whose logits are wanted, from the end.

        Returns:
            Logits [last, vocabulary], float32.
        """
        ids = np.ascontiguousarray(tokens.reshape(1, -1), np.int64)
        mask = np.ones((1, past + ids.shape[1]), np.int64)
        bound = self._prompts
        self._place(bound, slot, 1)
        if self._layout.logits_start:
            # bind_cpu_input knows required inputs only; this one has a default.
            start = ort.OrtValue.ortvalue_from_numpy(np.array([-last], np.int64))
            bound.binding.bind_ortvalue_input(LOGITS_START, start)
        bound.binding.bind_output("logits", "cpu")
        self._run(bound, ids, mask)
        logits = bound.binding.get_outputs()[-1].numpy()  # the cache was bound before the logits
        return np.array(logits[0, -last:], np.float32)

    def step(self, first: int, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Append one token to each of the slots from ``first`` on.

        Args:
            first: The first slot.
            tokens: [rows], int64: one for each slot in turn.
            lengths: [rows]: positions that each slot holds.

        Returns:
            Logits [rows, vocabulary], float32; valid until the next step.
        """
        rows = len(tokens)
        ids = np.ascontiguousarray(tokens.reshape(-1, 1), np.int64)
        ends = lengths.reshape(-1, 1) + 1
        mask = np.ascontiguousarray(np.arange(int(ends.max())) < ends, np.int64)
        bound = self._rows
        if self._place(bound, first, rows):
            self._bind_logits(bound.binding, rows)
        self._run(bound, ids, mask)
        return self._step_logits(bound, rows)

    def _place(self, bound: _Bound, first: int, count: int) -> bool:
        """Bind slots where others were bound; return whether that was so."""
        if bound.slots == (first, count):
            return False
        self.buffers.bind(bound.binding, first, count)
        bound.slots = (first, count)
        return True

    def _run(self, bound: _Bound, ids: np.ndarray, mask: np.ndarray) -> None:
        bound.binding.bind_cpu_input("input_ids", ids)
        bound.binding.bind_cpu_input("attention_mask", mask)
        if self._layout.position_ids:
            positions = np.ascontiguousarray(
                position_ids(mask)[:, -ids.shape[1] :]
            )  # alive until the run ends
            bound.binding.bind_cpu_input("position_ids", positions)
        self._session.run_with_iobinding(bound.binding)
        if self.buffers.states is not None and bound.slots is not None:
            self.buffers.states.settle(*bound.slots)

    def _bind_logits(self, binding: Any, rows: int) -> None:
        if not self._logits.shape[2]:  # their width is known after a run
            binding.bind_output("logits", "cpu")
            return
        if len(self._logits) < rows:
            self._logits = np.empty((rows, *self._logits.shape[1:]), self._logits.dtype)
        view = self._logits[:rows]
        binding.bind_output("logits", "cpu", 0, view.dtype.type, view.shape, view.ctypes.data)

    def _step_logits(self, bound: _Bound, rows: int) -> np.ndarray:
        if not self._logits.shape[2]:
            logits = bound.binding.get_outputs()[-1].numpy()
            self._logits = np.empty((self.buffers.slots, *logits.shape[1:]), logits.dtype)
            self._bind_logits(bound.binding, rows)
            return np.asarray(logits[:, 0], np.float32)
        return self._logits[:rows, 0].astype(np.float32, copy=False)


class _Bound:
    """A binding, and the slots that are bound to it: the first one and their number."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.slots: tuple[int, int] | None = None
