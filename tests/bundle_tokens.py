"""Greedy answers of a bundle's engine, requests of unequal length at once, and how transformers would go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from compressed import logits
from exactness import distance
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine.batch import run_rows
from rk_export.runtime.engine.open_batch import open_batch
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.generate import Row

_CHUNK = 8  # tokens of a prompt that are computed while others run


class Answer(Row):
    """A row that takes the likeliest token, whether it ends a text or not, and keeps the logits."""

    def __init__(self, prompt: Sequence[int], new_tokens: int) -> None:
        super().__init__(prompt, GenerationOptions(max_new_tokens=new_tokens), None, frozenset())
        self.logits: list[np.ndarray] = []

    def advance(self, logits: np.ndarray) -> int:
        self.logits.append(np.array(logits))
        return super().advance(logits)

    def until(self, end: int, at_most: int) -> list[int]:
        """Return the first tokens, without the token that ends a text and all behind it."""
        tokens = self.tokens[:at_most]
        return tokens[: tokens.index(end)] if end in tokens else tokens


def answers(bundle: Path, prompts: Sequence[Tensor], new_tokens: int) -> list[Answer]:
    """Continue prompts together, each in a slot of its own.

    Raises:
        AssertionError: The graph does not take slots.
    """
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    assert session.takes_slots
    rows = [Answer(prompt.tolist(), new_tokens) for prompt in prompts]
    capacity = max(len(row.prompt) for row in rows) + new_tokens
    options = EngineOptions(slots=len(rows), chunk=_CHUNK, capacity=capacity, kept_prefixes=0)
    for _ in run_rows(open_batch(session, options)[0], rows):
        pass
    assert len({tuple(row.tokens) for row in rows}) > 1, "one answer to every prompt would prove nothing"
    return rows


def answers_error(model: PreTrainedModel, rows: Sequence[Answer]) -> tuple[float, int]:
    """Return the error of the logits of all answers, and how many tokens are those that the model chooses.

    One pass over prompt and answer decides: where each token is the likeliest behind what precedes it, greedy decoding
    gives the same text.
    """
    worst, same = 0.0, 0
    for row in rows:
        count = len(row.tokens)
        ids = torch.tensor([[*row.prompt, *row.tokens]])
        expected = logits(model, ids)[0, -count - 1 : -1]
        worst = max(worst, distance(torch.from_numpy(np.stack(row.logits)), expected))
        same += int((expected.argmax(-1) == ids[0, -count:]).sum())
    return worst, same
