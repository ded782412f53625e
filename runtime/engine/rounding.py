"""Whether a row is computed to the same bit whatever other rows run beside it.

Kernels compute several rows at once, and what is left over by another path, which adds in another order. Its result
differs by 1e-7, and that rounds some int8 inputs to another number. The answer would then depend on the neighbours.
What a kernel does depends on the format, the block size and the processor, so it is tried and not looked up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from rk_export.runtime.engine.slots import SlotRunner

MULTIPLES = (1, 2, 4)  # of rows that are tried, smallest first
# Prompts are computed in multiples of that many tokens but for their end, so that a token meets the same path
# however a prompt is cut; all multiples of rows divide it.
GRAIN = 8
# Most tokens of a run that checks guesses: attention cuts a run into blocks of at least 16 tokens.
LONGEST_CHECK = 15
_SEED = 7
_ENOUGH_LOGITS = 1 << 16  # of a row: few of them agree by chance

logger = logging.getLogger(__name__)


def last_run(tokens: int) -> int:
    """Return how many tokens at the end of a prompt are computed in one run, where that matters; else 0.

    Attention cuts a run into blocks of twice its head width, and a single token in the last block is added up in
    another order. So a prompt that may leave one ends with a run of its own.
    """
    return GRAIN + 1 if tokens % GRAIN == 1 else 0


def row_multiple(runner: SlotRunner, positions: int, vocabulary: int) -> int | None:
    """Return the smallest number such that all multiples of it, up to all slots, give the same logits to a row.

    Args:
        runner: With eight slots, which are overwritten.
        positions: Tokens in every slot when steps are tried.
        vocabulary: Token ids are below it.

    Returns:
        1, 2 or 4, or None where a row's logits differ with each of them.
    """
    slots = runner.buffers.slots
    rng = np.random.default_rng(_SEED)
    for slot, prompt in enumerate(rng.integers(vocabulary, size=(slots, positions))):
        runner.extend(slot, prompt, 0)
    trials = rng.integers(vocabulary, size=(max(1, min(8, _ENOUGH_LOGITS // vocabulary)), slots))
    for multiple in MULTIPLES:
        if all(_agree(runner, tokens, positions, multiple) for tokens in trials):
            return multiple
    return None


def _agree(runner: SlotRunner, tokens: np.ndarray, positions: int, multiple: int) -> bool:
    """Whether steps of multiples of so many rows give the logits of a step of all rows."""
    slots = len(tokens)
    restore = _restorer(runner)

    def logits(first: int, rows: int) -> np.ndarray:
        # A step writes behind the positions that count, so that it can be tried again; states are put back.
        restore()
        return np.array(runner.step(first, tokens[first : first + rows], np.full(rows, positions)))

    everything = logits(0, slots)
    apart = [(first, multiple) for first in range(0, slots, multiple)]
    several = [(0, rows) for rows in range(2 * multiple, slots, multiple)]
    return all(
        np.array_equal(logits(first, rows), everything[first : first + rows])
        for first, rows in apart + several
    )


def _restorer(runner: SlotRunner) -> Callable[[], None]:
    """Return what puts the states of all slots back to what they are now."""
    states = runner.buffers.states
    if states is None:
        return lambda: None
    before = [states.read(slot) for slot in range(runner.buffers.slots)]

    def restore() -> None:
        for slot, state in enumerate(before):
            states.write(slot, state)

    return restore
