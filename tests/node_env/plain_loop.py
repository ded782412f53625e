"""Greedy decoding in plain ONNX Runtime: the same calls of the same graph as transformers.js makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

NEAR = 1e-3  # of the largest logit: activations that round to another int8 number move logits by so much


@dataclass(frozen=True)
class Greedy:
    """What a loop chose.

    Args:
        tokens: The new tokens.
        leads: By how much each was ahead of the next one, over the largest logit.
    """

    tokens: tuple[int, ...]
    leads: tuple[float, ...]

    def agrees(self, others: Sequence[int]) -> bool:
        """Whether other tokens are the same, or part where two tokens were as good as equal."""
        for one, other, lead in zip(self.tokens, others, self.leads, strict=False):
            if one != other:
                return lead < NEAR
        return len(others) == len(self.tokens)


def opened(model: Path) -> Any:
    """Open a graph on one thread of the processor."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def empty_cache(session: Any, rows: int) -> dict[str, np.ndarray]:
    """Return the past of a first call."""
    past = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    return {one.name: np.zeros((rows, one.shape[1], 0, one.shape[3]), types[one.type]) for one in past}


def greedy(model: Path, prompt: Sequence[int], most: int, ends: frozenset[int]) -> Greedy:
    """Continue a prompt until an end or so many tokens."""
    session = opened(model)
    names = [value.name for value in session.get_outputs()]
    takes = {value.name for value in session.get_inputs()}
    cache, new, tokens, leads = empty_cache(session, 1), np.array([prompt], np.int64), [], []
    for length in range(len(prompt), len(prompt) + most):
        feeds = {"input_ids": new, "attention_mask": np.ones((1, length), np.int64), **cache}
        if "position_ids" in takes:
            feeds["position_ids"] = np.arange(length - new.shape[1], length, dtype=np.int64)[None]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        logits = found.pop("logits")[0, -1].astype(np.float64)
        second, first = np.sort(logits)[-2:]
        tokens.append(int(logits.argmax()))
        leads.append(float(first - second) / float(np.abs(logits).max()))
        if tokens[-1] in ends:
            break
        cache = {name.replace("present", "past_key_values"): array for name, array in found.items()}
        new = np.array([tokens[-1:]], np.int64)
    return Greedy(tuple(tokens), tuple(leads))
