"""Parity as a contract: each step from the dense model to the running bundle is compared on its own.

| tier | reference | candidate | a difference means |
| --- | --- | --- | --- |
| a | PyTorch dense | PyTorch factorized | error of the factorization |
| b | PyTorch factorized | PyTorch quantized | error of the quantization |
| c | PyTorch quantized | ONNX Runtime, accuracy level 0 | a fault of the export or the runtime |
| d | ONNX Runtime, level 0 | ONNX Runtime as shipped | int8 activations (level 4, W8A8) |
| e | prefill | cached decode | a fault of the cache |
| f | single rows | left-padded batch | a fault of the padding |
| g | greedy tokens of PyTorch | greedy tokens of ONNX Runtime | a visible difference |

Rounding to int8 tells apart inputs that differ by 1e-7, so two exact computations of a W8A8 model may differ by a
good part of what its rounding costs (a tiny random GPT-2: a tenth). Tiers c, e, f and g therefore read those inputs in
floats on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rk_export.errors import InputError, ParityError
from rk_export.passes.modules import Int8Linear, float_inputs
from rk_export.probe import NEW_TOKENS, Probe
from rk_export.report import ParityTier
from rk_export.rewrite import DENSE, FACTORIZED, QUANTIZED, Rewritten
from rk_export.runtime import EncoderSession, GenerationOptions, Session
from rk_export.runtime.bundle_config import rotary_switch
from rk_export.runtime.providers import Provider
from rk_export.session_logits import (
    cached_logits,
    decoded_across,
    next_token_logits,
    one_rotation,
    padded_logits,
    prefilled_across,
    text_across,
)

# Largest |difference| over the largest |logit| that passes, by the float type of the graph.
RUNTIME_BOUND = {"fp32": 1e-4, "fp16": 5e-3}
# Some models lose more than that in half precision whoever computes (SmolLM2-135M in PyTorch: 1.4e-2, for its
# activations reach the thousands). An fp16 graph may then lose as much as twice PyTorch's own fp16.
HALF_PRECISION_FACTOR = 2.0
# int8 activations round every input of every quantized matrix, and single large activations make that coarse:
# SmolLM2-135M shows 0.13 (W8A8: 0.17), a tiny random Gemma 2 0.28. Half the scale is no rounding any more.
LEVEL4_BOUND = 0.5
DECODE_FROM = 8


@dataclass(frozen=True)
class Golden:
    """Greedy continuations at accuracy level 0 that PyTorch confirmed; they travel with the bundle.

    Args:
        prompts: Token ids.
        tokens: Generated ids, one row a prompt.
        bound: Largest relative error that two exact computations of this model may differ by.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    bound: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        rows = {"prompts": list(map(list, self.prompts)), "tokens": list(map(list, self.tokens))}
        return {**rows, "bound": self.bound}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Golden:
        """Undo `to_json`."""
        try:
            rows = tuple(map(tuple, data["prompts"])), tuple(map(tuple, data["tokens"]))
            return cls(*rows, float(data["bound"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "its greedy tokens are malformed",
                where="rk_manifest.json: golden",
                fix="export the bundle again",
            ) from error


def compare(
    tier: str, name: str, reference: np.ndarray, candidate: np.ndarray, *, bound: float | None, note: str = ""
) -> ParityTier:
    """Return the parity of two arrays of logits (batch, length, vocabulary)."""
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    error, scale = float(np.abs(candidate - reference).max()), float(np.abs(reference).max())
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    passed = None if bound is None else bool(np.isfinite(error) and error <= bound * scale)
    return ParityTier(
        tier=tier,
        name=name,
        max_error=error,
        scale=scale,
        bound=bound,
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        top1_agreement=float((reference.argmax(-1) == candidate.argmax(-1)).mean()),
        passed=passed,
        note=note,
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def method_tiers(rewritten: Rewritten, probe: Probe) -> Iterator[ParityTier]:
    """Yield tiers a and b from the logits that the rewriting carried along."""
    logits = {version: tensor.float().numpy() for version, tensor in rewritten.probe_logits.items()}
    note = f"{len(probe.prompts)} prompts of {len(probe.prompts[0])} tokens"
    yield compare(
        "a", "PyTorch dense vs factorized", logits[DENSE], logits[FACTORIZED], bound=None, note=note
    )
    yield compare(
        "b", "PyTorch factorized vs quantized", logits[FACTORIZED], logits[QUANTIZED], bound=None, note=note
    )


def runtime_tiers(
    bundle: Path,
    rewritten: Rewritten,
    probe: Probe,
    *,
    provider: Provider = "auto",
    threads: int | None = None,
) -> tuple[tuple[ParityTier, ...], Golden | None]:
    """Compare a bundle with the PyTorch model it was exported from: tiers c to g.

    Returns:
        The tiers, and the greedy tokens of tier g (None for an encoder).
    """
    bound, note = runtime_bound(rewritten, probe)
    reference = float_reference(rewritten, probe)
    name = "PyTorch quantized vs ONNX Runtime, level 0"
    if rewritten.architecture.is_encoder:
        encoder = EncoderSession.from_pretrained(bundle, provider=provider, threads=threads, accuracy_level=0)
        states = encoder.forward(probe.batch)
        return (
            compare("c", name, reference, states, bound=bound, note=note),
            encoder_padding_tier(encoder, probe, bound),
        ), None
    exact = Session.from_pretrained(bundle, provider=provider, threads=threads, accuracy_level=0)
    logits = exact.prefill_logits(probe.batch)
    tiers = [compare("c", name, reference, logits, bound=bound, note=note)]
    if (text := text_across(exact, probe)) is not None:
        tiers.append(_across_tier(rewritten, exact, text, bound))
    tiers += session_tiers(exact, probe, logits, bound)
    golden = greedy(exact, probe, bound)
    tiers.append(greedy_tier(rewritten, golden))
    del exact
    shipped = Session.from_pretrained(bundle, provider=provider, threads=threads)
    tiers.insert(1, level_tier(shipped, probe, logits, _int8_note(rewritten, reference)))
    return tuple(tiers), golden


@torch.no_grad()
def _across_tier(rewritten: Rewritten, exact: Session, text: np.ndarray, bound: float) -> ParityTier:
    """Return tier c of a decoding that crosses the switch of LongRoPE."""
    switch, decoded = exact.config.rotary_switch, decoded_across(exact, text)
    with float_inputs(rewritten.model):
        reference = next_token_logits(rewritten.model, torch.from_numpy(text), switch, decoded.shape[1])
    name, note = (
        "PyTorch vs cached decode, across LongRoPE's switch",
        f"{switch} tokens under the short factors",
    )
    return compare("c", name, reference.float().numpy()[None], decoded, bound=bound, note=note)


@torch.no_grad()
def float_reference(rewritten: Rewritten, probe: Probe) -> np.ndarray:
    """Return the quantized model's logits of the probe, all inputs in floats as at accuracy level 0."""
    if not has_int8_inputs(rewritten):
        return np.asarray(rewritten.probe_logits[QUANTIZED].float().numpy())
    with float_inputs(rewritten.model):
        output = rewritten.model(input_ids=torch.from_numpy(probe.batch), use_cache=False)
    return np.asarray(output[0].float().numpy())


def has_int8_inputs(rewritten: Rewritten) -> bool:
    """Whether a matrix of the model rounds its inputs to int8."""
    return any(isinstance(module, Int8Linear) for module in rewritten.model.modules())


def _int8_note(rewritten: Rewritten, reference: np.ndarray) -> str:
    if not has_int8_inputs(rewritten):
        return ""
    rounded = rewritten.probe_logits[QUANTIZED].float().numpy()
    lost = float(np.abs(rounded - reference).max() / np.abs(reference).max())
    return f"PyTorch's own int8 inputs differ from floats by {lost:.2g}"


@torch.no_grad()
def runtime_bound(rewritten: Rewritten, probe: Probe) -> tuple[float, str]:
    """Return the bound of tiers c, e and f as a relative error, and a note where it is not the common one."""
    float_dtype = rewritten.plan.options.float_dtype
    common = RUNTIME_BOUND[float_dtype]
    if float_dtype == "fp32":
        return common, ""
    reference = rewritten.probe_logits[QUANTIZED].float()
    half = copy.deepcopy(rewritten.model).half()
    output = half(input_ids=torch.from_numpy(probe.batch), use_cache=False)[0].float()
    lost = float((output - reference).abs().max() / reference.abs().max())
    note = f"PyTorch's own fp16 differs from fp32 by {lost:.2g}"
    return max(common, HALF_PRECISION_FACTOR * lost), note


def level_tier(shipped: Session, probe: Probe, exact_logits: np.ndarray, note: str = "") -> ParityTier:
    """Return tier d: the bundle as shipped against accuracy level 0."""
    name = "ONNX Runtime, level 0 vs as shipped"
    logits = shipped.prefill_logits(probe.batch)
    return compare("d", name, exact_logits, logits, bound=LEVEL4_BOUND, note=note)


def session_tiers(session: Session, probe: Probe, prefill: np.ndarray, bound: float) -> Iterator[ParityTier]:
    """Yield tiers e and f of one session: cached decode and left padding.

    Args:
        session: A bundle at accuracy level 0.
        probe: The prompts.
        prefill: Its logits on them in one go (prompts, length, vocabulary).
        bound: Largest relative error that passes.
    """
    switch = session.config.rotary_switch
    tokens = probe.batch
    if switch is not None and DECODE_FROM <= switch < tokens.shape[1]:
        tokens = tokens[:, :switch]
        prefill = session.prefill_logits(tokens)
    start = min(DECODE_FROM, tokens.shape[1] // 2)
    decoded = cached_logits(session, tokens, start)
    yield compare("e", "prefill vs cached decode", prefill[:, start:], decoded, bound=bound)
    if (text := text_across(session, probe)) is not None:
        name, decoded = "prefill vs cached decode, across LongRoPE's switch", decoded_across(session, text)
        yield compare("e", name, prefilled_across(session, text), decoded, bound=bound)
    rows, padded = padded_logits(session, one_rotation(probe.unequal(), switch))
    yield compare("f", "single rows vs left-padded batch", rows, padded, bound=bound)


def encoder_padding_tier(encoder: EncoderSession, probe: Probe, bound: float) -> ParityTier:
    """Return tier f of an encoder: the first token's state, alone and in a batch padded on the right."""
    prompts = probe.unequal()
    longest = max(len(prompt) for prompt in prompts)
    mask = np.array(
        [[position < len(prompt) for position in range(longest)] for prompt in prompts], dtype=np.int64
    )
    ids = np.array([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], dtype=np.int64)
    batch = encoder.forward(ids, mask)[:, :1]
    rows = np.concatenate([encoder.forward(np.array([prompt], dtype=np.int64))[:, :1] for prompt in prompts])
    return compare("f", "single rows vs padded batch", rows, batch, bound=bound)


def greedy(session: Session, probe: Probe, bound: float) -> Golden:
    """Return 64 greedy tokens (fewer where a text ends) of each prompt, generated in one batch."""
    room = min(NEW_TOKENS, session.max_length - len(probe.prompts[0]))
    rows = session.generate(probe.prompts, options=GenerationOptions(max_new_tokens=room))
    return Golden(probe.prompts, tuple(tuple(row.token_ids) for row in rows), bound)


@torch.no_grad()
def greedy_tier(rewritten: Rewritten, golden: Golden) -> ParityTier:
    """Return tier g: whether PyTorch's greedy decoding gives the same tokens.

    If at every position the likeliest next token is the one that was generated, then by induction PyTorch's
    own greedy decoding generates the same text; so one forward pass over prompt and text decides. In fp16 a
    token also passes where PyTorch prefers another by no more than two computations may differ.
    """
    exact = rewritten.plan.options.float_dtype == "fp32"
    switch = rotary_switch(rewritten.model.config.to_dict())
    same, within, total, widest = 0, 0, 0, 0.0
    for prompt, tokens in zip(golden.prompts, golden.tokens, strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        with float_inputs(rewritten.model):
            logits = next_token_logits(rewritten.model, ids, switch, len(tokens) + 1)[:-1]
        gaps = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        allowed = 0.0 if exact else 2 * golden.bound * float(logits.abs().max())
        same += int((gaps == 0).sum())
        within += int((gaps <= allowed).sum())
        total += len(tokens)
        widest = max(widest, float(gaps.max()))
    margin = f"; where they differ, PyTorch's own margin is at most {widest:.2g}" if same < total else ""
    return ParityTier(
        tier="g",
        name="greedy tokens, PyTorch vs ONNX Runtime",
        max_error=float(total - within),
        scale=float(total),
        bound=0.0,
        top1_agreement=same / total,
        passed=within == total,
        note=f"{len(golden.prompts)} prompts, {total} tokens{margin}",
    )


def bundle_tiers(
    bundle: Path, golden: Golden, float_dtype: str, *, provider: Provider = "auto", threads: int | None = None
) -> tuple[ParityTier, ...]:
    """Verify a decoder bundle on its own: tiers d, e and f, and g against the tokens that travel with it."""
    probe = Probe(golden.prompts)
    exact = Session.from_pretrained(bundle, provider=provider, threads=threads, accuracy_level=0)
    logits = exact.prefill_logits(probe.batch)
    tiers = list(session_tiers(exact, probe, logits, golden.bound))
    again = greedy(exact, probe, golden.bound)
    del exact
    shipped = Session.from_pretrained(bundle, provider=provider, threads=threads)
    same = sum(_common_prefix(a, b) for a, b in zip(golden.tokens, again.tokens, strict=True))
    total = sum(map(len, golden.tokens))
    tiers.append(
        ParityTier(
            tier="g",
            name="greedy tokens, stored at export vs now",
            max_error=float(total - same),
            scale=float(total),
            bound=0.0 if float_dtype == "fp32" else None,
            top1_agreement=same / total,
            passed=same == total if float_dtype == "fp32" else None,
            note=f"{len(golden.prompts)} prompts, {total} tokens",
        )
    )
    return (level_tier(shipped, probe, logits), *tiers)


def _common_prefix(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)


def require_parity(tiers: tuple[ParityTier, ...], where: str) -> None:
    """Raise ParityError unless every tier with a bound passed."""
    failed = [tier for tier in tiers if tier.passed is False]
    if failed:
        worst = "; ".join(
            f"tier {tier.tier} ({tier.name}): {tier.max_error:.3g} on a scale of {tier.scale:.3g}, bound {tier.bound}"
            for tier in failed
        )
        raise ParityError(f"parity is out of its bound: {worst}", where=where)
