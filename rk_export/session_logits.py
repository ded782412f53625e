"""The same logits computed in several ways, for parity: at once, with a cache, padded, past a change of rotation.

Models with LongRoPE (arXiv:2402.13753) rotate long texts otherwise than short ones. Hugging Face ``generate`` computes
each token from all tokens before it under one rotation, the short one up to the switch and the long one after it;
every reference here is computed that way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.probe import Probe
from rk_export.runtime import Session
from rk_export.runtime.generate import left_padded

_AFTER = 2  # tokens past the switch: the one that runs all anew, and one that reads the new cache


def cached_logits(session: Session, tokens: np.ndarray, start: int) -> np.ndarray:
    """Return logits of the positions from `start` on, each computed with a cache of those before."""
    _, past = session.forward(tokens[:, :start])
    steps = []
    for position in range(start, tokens.shape[1]):
        logits, past = session.forward(tokens[:, position : position + 1], past=past)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def padded_logits(session: Session, prompts: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of the last position, (prompts, 1, vocabulary), of single rows and of the padded batch."""
    ids, mask = left_padded(prompts)
    batch = session.prefill_logits(ids, mask)[:, -1:]
    rows = [session.prefill_logits(np.array([prompt], dtype=np.int64))[:, -1:] for prompt in prompts]
    return np.concatenate(rows), batch


def next_token_logits(model: PreTrainedModel, ids: Tensor, switch: int | None, keep: int) -> Tensor:
    """Return the logits after each of the last prefixes of a text, each prefix under its own rotation.

    Args:
        model: In PyTorch.
        ids: int64 (1, length).
        switch: Longest sequence under the short factors; None where one rotation serves all.
        keep: Prefixes: the text itself, the text without its last token, and so on.

    Returns:
        (keep, vocabulary), the shortest prefix first.
    """
    length = ids.shape[1]
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
    if switch is None or switch >= length or switch <= length - keep:
        return logits
    short = switch - (length - keep)
    before = model(input_ids=ids[:, :switch], use_cache=False, logits_to_keep=short).logits[0]
    return torch.cat([before, logits[short:]])


def one_rotation(prompts: Sequence[Sequence[int]], switch: int | None) -> tuple[tuple[int, ...], ...]:
    """Return the prompts, all cut by as many tokens as bring the longest under the switch, unless all are above."""
    longest, shortest = (pick(len(prompt) for prompt in prompts) for pick in (max, min))
    cut = 0 if switch is None or shortest > switch else max(0, longest - switch)
    return tuple(tuple(prompt[: max(1, len(prompt) - cut)]) for prompt in prompts)


def text_across(session: Session, probe: Probe) -> np.ndarray | None:
    """Return a text of the probe's tokens, int64 (1, length), that ends past the switch; None where there is none."""
    switch = session.config.rotary_switch
    if switch is None or switch >= session.max_length:
        return None
    return np.resize(probe.batch, (1, min(switch + _AFTER, session.max_length)))


def decoded_across(session: Session, text: np.ndarray) -> np.ndarray:
    """Return the logits of the last steps of a decoding that crosses the switch, (1, steps, vocabulary)."""
    length = text.shape[1]
    decoder = session.decoder(batch=1, capacity=length)
    decoder.prefill(text[:, : _start(session)])
    steps = [np.array(decoder.step(text[:, at])) for at in range(_start(session), length)]
    return np.stack(steps, axis=1)


def prefilled_across(session: Session, text: np.ndarray) -> np.ndarray:
    """Return what `decoded_across` returns, each step computed from the whole text before it."""
    lengths = range(_start(session) + 1, text.shape[1] + 1)
    runs = [session.decoder(batch=1, capacity=end).prefill(text[:, :end]) for end in lengths]
    return np.stack(runs, axis=1)


def _start(session: Session) -> int:
    switch = session.config.rotary_switch
    return max(1, (switch or 1) - 1)
