"""How runs are cut and filled up, so that no row meets another path of a kernel for its neighbours' sake."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runtime_models import KV_HEADS, TinyDecoder

from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine.device_copy import Copier
from rk_export.runtime.engine.pace import Pace
from rk_export.runtime.engine.rounding import GRAIN, row_multiple
from rk_export.runtime.engine.running import Running
from rk_export.runtime.engine.slot_batch import SlotBatch
from rk_export.runtime.engine.slots import SlotBuffers, lazy_zeros
from rk_export.runtime.generate import Row

VOCABULARY = 64


class Kernel:
    """Stands in for a graph: computes `block` rows at once, and what is left over by a path with another last bit."""

    def __init__(self, block: int, slots: int = 8) -> None:
        self.buffers = SimpleNamespace(slots=slots, copy=lambda *given: None, states=None)
        self.block = block
        self.prompts: list[int] = []  # tokens of each run of a prompt
        self.steps: list[int] = []  # rows of each step

    def extend(self, slot: int, tokens: np.ndarray, past: int, *, last: int = 1) -> np.ndarray:
        self.prompts.append(len(tokens))
        return np.zeros((last, VOCABULARY), np.float32)

    def step(self, first: int, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.steps.append(len(tokens))
        rows = len(tokens)
        whole = rows - rows % self.block if self.block else 0
        logits = np.repeat(tokens[:, None].astype(np.float32), VOCABULARY, axis=1) + 1
        if self.block:
            logits[whole:] = np.nextafter(logits[whole:], np.float32(1e9))
        else:
            logits = logits * np.float32(1 + rows * 1e-6)
        return logits


@pytest.mark.parametrize(("block", "multiple"), [(1, 1), (2, 2), (4, 4), (0, None)])
def test_the_multiple_is_that_of_the_kernel(block: int, multiple: int | None) -> None:
    kernel: Any = Kernel(block)
    assert row_multiple(kernel, 4, VOCABULARY) == multiple


def test_a_bundle_has_a_multiple(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = TinyDecoder().write(tmp_path_factory.mktemp("bundle"))
    session = Session.from_pretrained(folder, provider="cpu", threads=1)
    assert session.rows_are_independent
    assert session.row_multiple in (1, 2, 4)


def ran(kernel: Kernel, lengths: list[int], *, slots: int, chunk: int, multiple: int = 1) -> None:
    """Answer prompts of these lengths with three tokens each."""
    runner: Any = kernel
    batch = SlotBatch(runner, slots=slots, pace=Pace(chunk), multiple=multiple)
    options = GenerationOptions(max_new_tokens=3)
    waiting = deque(Running(Row([1] * length, options, None, frozenset())) for length in lengths)
    while waiting or batch.running:
        while waiting and batch.has_room:
            batch.add(waiting.popleft())
        batch.step()


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_steps_are_filled_up(multiple: int) -> None:
    kernel = Kernel(1, slots=5 + multiple - 1)
    ran(kernel, [5] * 11, slots=5, chunk=8, multiple=multiple)
    assert kernel.steps
    assert all(rows % multiple == 0 for rows in kernel.steps)


@pytest.mark.parametrize("chunk", [1, 8, 24, 64, 512])
def test_no_prompt_leaves_a_single_token_to_a_run(chunk: int) -> None:
    """Whole grains come first; a prompt that would leave one token ends with nine, in one run."""
    for length in range(1, 200):
        kernel = Kernel(1, slots=1)
        ran(kernel, [length], slots=1, chunk=chunk)
        *whole, last = kernel.prompts
        assert sum(kernel.prompts) == length
        assert all(tokens % GRAIN == 0 for tokens in whole)
        assert last > 1 or length == 1
        if length % GRAIN == 1 and length > 1:
            assert last == GRAIN + 1


def test_memory_is_taken_where_it_is_written_to() -> None:
    zeros = lazy_zeros((3, 5), np.dtype(np.float16))
    assert zeros.dtype == np.float16
    assert zeros.shape == (3, 5)
    assert not zeros.any()
    zeros[1, 2] = 4
    assert zeros.sum() == 4


def test_a_device_copies_slots_by_a_graph(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The copy of a device, carried out on the CPU: the same graph, the same addresses."""
    folder = TinyDecoder().write(tmp_path_factory.mktemp("bundle"))
    layout = Session.from_pretrained(folder, provider="cpu", threads=1).layout
    buffers = SlotBuffers(layout, slots=3, capacity=4, device="cpu")
    rng = np.random.default_rng(0)
    for array in buffers._arrays:
        array[...] = rng.standard_normal(array.shape)
    before = [array.copy() for array in buffers._arrays]
    buffers._copy_on_device(Copier(layout.cache_dtype, "cpu"), 2, 0)
    for array, old in zip(buffers._arrays, before, strict=True):
        assert array.shape[1] == KV_HEADS
        np.testing.assert_array_equal(array, old[[2, 1, 2]])
