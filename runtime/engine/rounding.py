"""Whether a row is computed to the same bit whatever other rows run beside it.

Kernels compute several rows at once, and what is left over by another path, which adds in another order. Its result
differs by 1e-7, and that rounds some int8 inputs to another number. The answer would then depend on the neighbours.
What a kernel does depends on the format, the block size and the processor, so it is tried and not looked up.
"""

from __future__ import annotations

import logging

import numpy as np

from rk_export.runtime.engine.slots import SlotRunner

MULTIPLES = (1, 2, 4)  # of rows that are tried, smallest first
# Prompts are computed in multiples of that many tokens but for their end, so that a token meets the same path
# however a prompt is cut; all multiples of rows divide it.
GRAIN = 8
_SEED = 7

logger = logging.getLogger(__name__)


def row_multiple(runner: SlotRunner, positions: int, vocabulary: int) -> int | None:
    """Return the smallest number such that all multiples of it, up to all slots, give the same logits to a row.

    Args:
        runner: With at least four slots, which are overwritten.
        positions: Tokens in every slot when the step is tried.
        vocabulary: Token ids are below it.

    Returns:
        1, 2 or 4, or None where a row's logits differ with each of them.
    """
    slots = runner.buffers.slots
    rng = np.random.default_rng(_SEED)
    prompts = rng.integers(vocabulary, size=(slots, positions))
    tokens = rng.integers(vocabulary, size=slots)
    lengths = np.full(slots, positions)
    for slot, prompt in enumerate(prompts):
        runner.extend(slot, prompt, 0)
    # A step writes behind the positions that count, so that it can be tried again.
    logits = {rows: np.array(runner.step(0, tokens[:rows], lengths[:rows])) for rows in range(1, slots + 1)}
    for multiple in MULTIPLES:
        tried = range(multiple, slots + 1, multiple)
        most = logits[tried[-1]]
        if all(np.array_equal(logits[rows], most[:rows]) for rows in tried):
            return multiple
    return None
