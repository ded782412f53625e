"""The gauge of a factor pair that is about to be quantized: B A = (B G) (G^-1 A) for any invertible G.

Each direction first gets the same norm on both sides, so that blocks of B hold entries of like size. With GPTQ an
orthogonal mixing of the directions follows: what B reads is then correlated, and the error of B is paid with the
geometric mean of the directions' second moments instead of their arithmetic mean. On factor pairs of a 135M model
in 4 bits (blocks of 32, ranks 256 and 384) GPTQ left 3.0 to 6.2 % output error so, 5.5 to 8.0 % without the
mixing, and 12 to 13 % in the gauge where B carries all singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rk_export.passes.prepare.orthogonal import orthogonal


def balanced_gauge(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return B (out, k) and A (k, in) with columns of B and rows of A of equal norms, their product unchanged."""
    tiny = torch.finfo(torch.float32).tiny
    scale = (up.norm(dim=0).clamp_min(tiny) / down.norm(dim=1).clamp_min(tiny)).sqrt()
    return up / scale, down * scale[:, None]


def mixed_gauge(up: Tensor, down: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return B Q and Qᵀ A in the balanced gauge, Q a random orthogonal (k, k) matrix that depends on the seed."""
    up, down = balanced_gauge(up, down)
    mixing = orthogonal(down.shape[0], torch.Generator().manual_seed(seed))
    return mixing.right(up), mixing.left(down)
