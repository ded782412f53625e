"""Tier i: many requests at once, as shipped, against each of them alone."""

from __future__ import annotations

import numpy as np

from rk_export.parity.comparison import compare, not_measured
from rk_export.parity.probe import Probe
from rk_export.report.records import ParityTier
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine.batch import run_rows
from rk_export.runtime.engine.open_batch import open_batch
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.generate import Row

_NAME = "single requests vs many at once, as shipped"
_NEW_TOKENS = 4
_CHUNK = 8  # of a prompt that is computed while others run
_ALONE = 512


def slots_tier(shipped: Session, probe: Probe) -> ParityTier:
    """Return tier i: the logits of answers of unequal prompts, each alone and all at once.

    A row depends on nothing but itself, so they are equal to the bit. Where a processor rounds a row otherwise beside
    other rows, the tier gives no verdict and says so.
    """
    if not shipped.takes_slots:
        return not_measured("i", _NAME, "this graph runs requests one by one")
    prompts = probe.unequal()
    alone = [_answered(shipped, [prompt], _ALONE)[0] for prompt in prompts]
    together = _answered(shipped, list(prompts), _CHUNK)
    exact = shipped.rows_are_independent
    note = f"{len(prompts)} requests, {_NEW_TOKENS} tokens each"
    if not exact:
        note += "; this processor rounds a row otherwise beside other rows"
    return compare(
        "i", _NAME, np.concatenate(alone), np.concatenate(together), bound=0.0 if exact else None, note=note
    )


class _Recorded(Row):
    """A row that takes the likeliest token, whether it ends a text or not, and keeps the logits."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        super().__init__(prompt, GenerationOptions(max_new_tokens=_NEW_TOKENS), None, frozenset())
        self.logits: list[np.ndarray] = []

    def advance(self, logits: np.ndarray) -> int:
        self.logits.append(np.array(logits))
        return super().advance(logits)


def _answered(session: Session, prompts: list[tuple[int, ...]], chunk: int) -> list[np.ndarray]:
    """Return the logits [tokens, vocabulary] of the answer of each prompt."""
    rows = [_Recorded(prompt) for prompt in prompts]
    capacity = max(map(len, prompts)) + _NEW_TOKENS
    options = EngineOptions(slots=len(rows), chunk=chunk, capacity=capacity, kept_prefixes=0)
    batch, _ = open_batch(session, options)
    for _ in run_rows(batch, rows):
        pass
    return [np.stack(row.logits) for row in rows]
