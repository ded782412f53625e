"""Greedy tokens of a bundle at accuracy level 0: confirmed by PyTorch at export, repeated by later checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.json_codec import Float
from rk_export.model.switches import LONG_ROTATION, switches_of
from rk_export.parity.probe import NEW_TOKENS, Probe
from rk_export.passes.modules.quantized import float_inputs
from rk_export.report.records import ParityTier
from rk_export.rewrite.apply import Rewritten
from rk_export.runtime import GenerationOptions, Session


@dataclass(frozen=True)
class Golden:
    """Greedy continuations at accuracy level 0 that PyTorch confirmed; they travel with the bundle.

    Args:
        probe: The prompts.
        tokens: Generated ids: one row a prompt, then one a crossing, continued from before its switch.
        bound: Largest relative error that two exact computations of this model may differ by.
        level_bound: Largest relative error of the bundle as shipped against level 0.
    """

    probe: Probe
    tokens: tuple[tuple[int, ...], ...]
    bound: Float
    level_bound: Float

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """What each row of tokens continues."""
        return (*self.probe.prompts, *(item.tokens[: item.start] for item in self.probe.crossings))


def greedy_tokens(session: Session, probe: Probe) -> tuple[tuple[int, ...], ...]:
    """Return 64 greedy tokens (fewer where a text ends) of each prompt, generated in one batch, and each crossing."""
    rows = _generated(session, probe.prompts)
    for item in probe.crossings:
        rows += _generated(session, (item.tokens[: item.start],))
    return rows


def _generated(session: Session, prompts: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    room = min(NEW_TOKENS, session.max_length - len(prompts[0]))
    rows = session.generate(prompts, options=GenerationOptions(max_new_tokens=room))
    return tuple(tuple(row.token_ids) for row in rows)


@torch.no_grad()
def greedy_tier(rewritten: Rewritten, golden: Golden, error: float) -> ParityTier:
    """Return tier g: whether PyTorch's greedy decoding gives the same tokens.

    If at every position the likeliest next token is the one that was generated, then by induction PyTorch's
    own greedy decoding generates the same text; so one forward pass over prompt and text decides. A token also
    passes where PyTorch prefers another by no more than two computations differ: each by what the exact tiers showed in
    fp32, by their bound in fp16.

    Args:
        rewritten: The quantized model.
        golden: What the bundle generated.
        error: The largest relative error of tiers c, e and f.
    """
    exact = rewritten.plan.recipe.target.float_dtype == "fp32"
    within_rounding = min(error, golden.bound) if exact else golden.bound
    same, within, total, widest = 0, 0, 0, 0.0
    for start, tokens in zip(golden.starts, golden.tokens, strict=True):
        logits = _continuation(rewritten, start, tokens)
        gaps = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        allowed = 2 * within_rounding * float(logits.abs().max())
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
        note=f"{len(golden.probe.prompts)} prompts, {total} tokens{golden.probe.crossed()}{margin}",
    )


def _continuation(rewritten: Rewritten, start: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor:
    """Return the logits (tokens, vocabulary) that PyTorch's greedy decoding would choose each token by.

    Past the switch of a long rotation the whole text is rotated otherwise, so what was chosen before it is computed
    on its own.
    """
    ids = torch.tensor([[*start, *tokens]])
    rotations = [item.tokens for item in switches_of(rewritten.description) if item.name == LONG_ROTATION]
    with float_inputs(rewritten.model):
        logits = _last_logits(rewritten, ids, len(tokens) + 1)[:-1]
        for switch in rotations:
            before = switch - len(start) + 1
            if 0 < before <= len(tokens):
                logits[:before] = _last_logits(rewritten, ids[:, :switch], before)
    return logits


def _last_logits(rewritten: Rewritten, ids: Tensor, count: int) -> Tensor:
    output = rewritten.model(input_ids=ids, use_cache=False, logits_to_keep=count)
    logits: Tensor = output.logits[0, -count:]
    return logits


def stored_greedy_tier(golden: Golden, again: tuple[tuple[int, ...], ...], float_dtype: str) -> ParityTier:
    """Return tier g of a bundle alone: whether it still gives the tokens that travel with it."""
    same = sum(_common_prefix(a, b) for a, b in zip(golden.tokens, again, strict=True))
    total = sum(map(len, golden.tokens))
    exact = float_dtype == "fp32"
    return ParityTier(
        tier="g",
        name="greedy tokens, stored at export vs now",
        max_error=float(total - same),
        scale=float(total),
        bound=0.0 if exact else None,
        top1_agreement=same / total,
        passed=same == total if exact else None,
        note=f"{len(golden.probe.prompts)} prompts, {total} tokens{golden.probe.crossed()}",
    )


def _common_prefix(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)
