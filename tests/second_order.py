"""What an error of one matrix costs, written as the mathematics says: what the library's faster forms are held to."""

from __future__ import annotations

from torch import Tensor


def loss_increase(gradient: Tensor, difference: Tensor, second: Tensor, tokens: int) -> float:
    """Return ½ tokens tr(G ΔW C ΔWᵀ) (1503.05671), nats a token by which the divergence from the dense model grows.

    Args:
        gradient: G, as in `DenseStatistics.gradients`: (out, out), or its diagonal (out,).
        difference: ΔW (out, in).
        second: C (in, in).
        tokens: As in `DenseStatistics`.
    """
    error = difference @ second @ difference.T
    weighed = gradient * error.diagonal() if gradient.ndim == 1 else gradient * error
    return 0.5 * tokens * float(weighed.sum())
