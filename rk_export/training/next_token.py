"""The language-model loss of given tokens, for training: logits of some rows exist at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rk_export.training.distillation import Head


def backward_next_token(hidden: Tensor, head: Head, ids: Tensor, *, share: float = 1.0) -> float:
    """Add the gradients of share · mean cross entropy of the next tokens; return the mean, in nats.

    The gradient by some rows is taken before the next rows' logits are computed, so that memory does not grow with
    the number of tokens.

    Args:
        hidden: Last hidden states (batch, length, d), part of a graph.
        head: The output projection; it is not trained.
        ids: Token ids (batch, length); each but the first of a sequence is predicted.
        share: Weight of these tokens in the step.
    """
    states, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    total = 0.0
    gradients: list[Tensor] = []
    for begin in range(0, len(targets), head.rows):
        rows = states[begin : begin + head.rows].detach().requires_grad_(True)
        wanted = targets[begin : begin + head.rows]
        loss = nn.functional.cross_entropy(head.logits(rows), wanted, reduction="sum") / len(targets)
        gradients += torch.autograd.grad(loss, rows)
        total += float(loss.detach())
    states.backward(share * torch.cat(gradients))  # type: ignore[no-untyped-call]
    return total
