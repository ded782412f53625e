"""What is said first, and loudly, of a compressed model that ended far from the dense one."""

from __future__ import annotations

from torch import Tensor

from rk_export.options.recipe import Recipe
from rk_export.rewrite.apply import DENSE, QUANTIZED, Rewritten

# Mean Kullback-Leibler divergence from the dense model on the probe, in nats a token, beyond which it is far.
# SmolLM2-135M in INT4 shows 0.12; 0.5 more nats a token are e^0.5 = 1.6 times the perplexity.
FAR = 0.5


def far_from_dense(rewritten: Rewritten) -> tuple[str, ...]:
    """Return a warning where a compressed decoder is far from the dense one on the probe, else nothing.

    Parity tiers compare the bundle with the compressed model, and pass for a model that was ruined faithfully.
    """
    logits = rewritten.probe_logits
    if rewritten.architecture.is_encoder or not {DENSE, QUANTIZED} <= logits.keys():
        return ()
    distance = divergence(logits[DENSE], logits[QUANTIZED])
    if distance <= FAR:
        return ()
    help_ = "; ".join(_what_helps(rewritten.plan.recipe))
    return (
        f"the compressed model is far from the dense one: its next-token distribution diverges by {distance:.2f} nats "
        f"a token on the probe, where {FAR} is the most that is taken without a warning. What would help: {help_}.",
    )


def divergence(dense: Tensor, other: Tensor) -> float:
    """Return the mean over tokens of KL(dense ‖ other) in nats, for logits (batch, length, vocabulary)."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (dense, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _what_helps(recipe: Recipe) -> list[str]:
    """Return what to change, the likeliest cause first."""
    help_ = []
    stages = {method.stage for method in recipe.methods}
    if recipe.limit is not None or recipe.rank is not None or "prune" in stages:
        help_.append("keep more of the model")
    if recipe.quant is not None and recipe.quant.bits < 8:
        help_.append("more bits (--set quantize.bits=8)")
    if recipe.quant is not None and recipe.quantizer != "gptq":
        help_.append("rounding by GPTQ (--set quantize.with=gptq)")
    if not recipe.calibration.uses_text:
        help_.append("errors weighed by text (--set calibration.text=self, or a file)")
    elif recipe.calibration.metric == "self":
        help_.append("text of your own (--set calibration.text=FILE)")
    if "recover" not in stages:
        help_.append("recovery (--set heal.steps=100)")
    return help_
