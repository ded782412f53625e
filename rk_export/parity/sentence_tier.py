"""The tier of sentence vectors: PyTorch's, text by text, against the graph's of a padded batch.

The modules are computed here from their definition, a text at a time and without padding. The graph computes a whole
batch with a mask, so its pooling and its treatment of padding are both seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rk_export.model.sentence_modules import Dense, Norm
from rk_export.model.torch_logits import torch_logits
from rk_export.parity.comparison import compare
from rk_export.parity.probe import Probe
from rk_export.passes.modules.quantized import float_inputs
from rk_export.report.records import ParityTier
from rk_export.rewrite.apply import Rewritten
from rk_export.runtime import EncoderSession
from rk_export.runtime.encoder import padded
from rk_export.source.sentence_head import SentenceHead

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "ReLU": functional.relu,
    "Sigmoid": torch.sigmoid,
    "GELU": functional.gelu,
    "SiLU": functional.silu,
    "Identity": lambda value: value,
}


def sentence_tier(
    encoder: EncoderSession, rewritten: Rewritten, head: SentenceHead, probe: Probe
) -> ParityTier:
    """Return tier s: each text's vector alone in PyTorch, and in a batch of the graph padded on the right.

    Args:
        encoder: The bundle at accuracy level 0.
        rewritten: The model that it was exported from.
        head: What follows its hidden states.
        probe: The prompts.
    """
    rows = [np.array([row], np.int64) for row in probe.unequal()]
    with float_inputs(rewritten.model):
        states = [torch_logits(rewritten.model)(row)[0].float() for row in rows]
    expected = np.stack([sentence_vector(head, state).numpy() for state in states])
    found = encoder.sentence_vectors(*padded(probe.unequal()))
    what = ", ".join((*head.modules.pooling, *(type(step).__name__ for step in head.modules.steps)))
    return compare(
        "s", "vectors of PyTorch vs of ONNX Runtime, level 0", expected, found, bound=None, note=what
    )


def sentence_vector(head: SentenceHead, states: Tensor) -> Tensor:
    """Return the vector of one text.

    Args:
        head: What is computed.
        states: The hidden states of its tokens (length, hidden), without padding, float32.
    """
    vector = torch.cat([_pooled(mode, states) for mode in head.modules.pooling])
    for step in head.modules.steps:
        if isinstance(step, Dense):
            vector = _dense(step, vector, head)
        elif isinstance(step, Norm):
            gain, bias = (head.weights[f"{step.folder}.norm.{name}"] for name in ("weight", "bias"))
            vector = functional.layer_norm(vector, gain.shape, gain, bias)
        else:
            vector = functional.normalize(vector, dim=0)
    return vector


def _pooled(mode: str, states: Tensor) -> Tensor:
    length = len(states)
    if mode == "cls":
        return states[0]
    if mode == "lasttoken":
        return states[-1]
    if mode == "max":
        return states.amax(0)
    if mode == "weightedmean":
        places = torch.arange(1, length + 1, dtype=states.dtype)
        return places @ states / places.sum()
    return states.sum(0) / (length**0.5 if mode == "mean_sqrt_len_tokens" else length)


def _dense(step: Dense, vector: Tensor, head: SentenceHead) -> Tensor:
    weights = {name: head.weights.get(f"{step.folder}.{name}") for name in ("linear.weight", "linear.bias")}
    weight = weights["linear.weight"]
    assert weight is not None
    result = _ACTIVATIONS[step.activation](functional.linear(vector, weight, weights["linear.bias"]))
    if not step.residual:
        return result
    residual = head.weights.get(f"{step.folder}.residual.weight")
    return result + (vector if residual is None else functional.linear(vector, residual))
