"""Tiers that a bundle is compared with itself in: shipped or exact, cached or at once, padded or alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rk_export.model.switches import LONG_ROTATION
from rk_export.parity.comparison import compare
from rk_export.parity.probe import DECODE_FROM, Crossing, Probe
from rk_export.report.records import ParityTier
from rk_export.runtime import EncoderSession, Session

LEVEL_TIER = "ONNX Runtime, level 0 vs as shipped"


def session_tiers(
    session: Session, probe: Probe, prefill: np.ndarray, bound: float | None
) -> Iterator[ParityTier]:
    """Yield tiers e and f of one session: cached decode and left padding.

    Args:
        session: A bundle at accuracy level 0.
        probe: The prompts.
        prefill: Its logits on them in one go (prompts, length, vocabulary).
        bound: Largest relative error that passes; None gives no verdict.
    """
    start = min(DECODE_FROM, probe.batch.shape[1] // 2)
    pairs = [(prefill[:, start:], _cached_logits(session, probe.batch, start))]
    pairs += [_crossed(session, item) for item in probe.crossings]
    at_once, decoded = (_rows(list(arrays)) for arrays in zip(*pairs, strict=True))
    note = probe.crossed().removeprefix("; ")
    yield compare("e", "prefill vs cached decode", at_once, decoded, bound=bound, note=note)
    rows, padded = _padded_logits(session, probe.unequal())
    yield compare("f", "single rows vs left-padded batch", rows, padded, bound=bound)


def shipped_padding_tier(shipped: Session, probe: Probe) -> ParityTier:
    """Return tier h: what left padding changes in the bundle as shipped; measured, for no bound would be honest.

    A padded row has other rotary positions than the single row, exact computations differ by 1e-7 for it, and that
    is enough to round single inputs to another int8 number.
    """
    rows, padded = _padded_logits(shipped, probe.unequal())
    return compare("h", "single rows vs left-padded batch, as shipped", rows, padded, bound=None)


def _crossed(session: Session, crossing: Crossing) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([crossing.tokens], np.int64)
    if crossing.switch.name == LONG_ROTATION:
        return _turned(session, tokens, crossing.start)
    at_once = session.prefill_logits(tokens, start=crossing.start)
    return at_once, _cached_logits(session, tokens, crossing.start)


def _turned(session: Session, tokens: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of positions from `start` on, each from its whole text, and from a decoder, (1, steps, width).

    A long rotation turns every key anew: the decoder computes its cache once more, and each text at once has the
    rotation of its own length.
    """
    length = tokens.shape[1]
    decoder = session.decoder(batch=1, capacity=length)
    decoder.prefill(tokens[:, :start])
    decoded = [np.array(decoder.step(tokens[:, position])) for position in range(start, length)]
    at_once = [
        session.decoder(batch=1, capacity=end).prefill(tokens[:, :end])
        for end in range(start + 1, length + 1)
    ]
    return np.stack(at_once, axis=1), np.stack(decoded, axis=1)


def _rows(arrays: list[np.ndarray]) -> np.ndarray:
    """Return logits of any batches and lengths as one batch, (1, positions, vocabulary)."""
    if len(arrays) == 1:
        return arrays[0].reshape(1, -1, arrays[0].shape[-1])
    return np.concatenate([array.reshape(1, -1, array.shape[-1]) for array in arrays], axis=1)


def _cached_logits(session: Session, tokens: np.ndarray, start: int) -> np.ndarray:
    """Return logits of the positions from `start` on, each computed with a cache of those before."""
    _, past = session.forward(tokens[:, :start])
    steps = []
    for position in range(start, tokens.shape[1]):
        logits, past = session.forward(tokens[:, position : position + 1], past=past)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def _left_padded(prompts: Sequence[Sequence[int]], padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask, int64 [batch, longest]; shorter prompts are padded (mask 0) on the left."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), padding, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _padded_logits(session: Session, prompts: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of the last position, (prompts, 1, vocabulary), of single rows and of the padded batch."""
    ids, mask = _left_padded(prompts)
    batch = session.prefill_logits(ids, mask)[:, -1:]
    rows = [session.prefill_logits(np.array([prompt], dtype=np.int64))[:, -1:] for prompt in prompts]
    return np.concatenate(rows), batch


def encoder_output(encoder: EncoderSession, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Return what an encoder gives, (batch, length, width): hidden states or logits, one row of them for a text."""
    output = encoder.logits(ids, mask) if encoder.has_logits else encoder.forward(ids, mask)
    return output[:, None] if output.ndim == 2 else output


def encoder_padding_tier(
    encoder: EncoderSession, probe: Probe, bound: float | None, padding: int
) -> ParityTier:
    """Return tier f of an encoder: all that it gives for a text, alone and in batches padded on either side.

    Args:
        encoder: A bundle at accuracy level 0.
        probe: The prompts.
        bound: Largest relative error that passes; None gives no verdict.
        padding: The token that stands for padding: some encoders count positions from it.
    """
    prompts = probe.unequal()
    alone = [encoder_output(encoder, np.array([prompt], dtype=np.int64)) for prompt in prompts]
    left = _left_padded(prompts, padding)
    found = []
    for ids, mask in (left, _right_padded(*left)):
        for row, own in zip(encoder_output(encoder, ids, mask), mask, strict=True):
            found.append(row[own.astype(bool)] if len(row) == len(own) else row)
    return compare(
        "f",
        "single rows vs padded batch",
        np.concatenate([*(row[0] for row in alone)] * 2)[None],
        np.concatenate(found)[None],
        bound=bound,
        note="padded on the left, and on the right",
    )


def _right_padded(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask, padded on the left, with the padding on the right."""
    places = (np.arange(ids.shape[1]) + mask.argmax(1)[:, None]) % ids.shape[1]
    return np.take_along_axis(ids, places, 1), np.take_along_axis(mask, places, 1)
