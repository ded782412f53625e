"""GPTQ (2210.17323): each column's rounding error is made up for by the columns that are rounded after it.

With H the damped second moment of the inputs, factored as H = (I + U) D (I + U)ᵀ, U strictly upper triangular and D
diagonal, columns are rounded in turn, column j after the errors e_i of the earlier ones were added to it:

    ŵ_j = round(w_j + Σ_{i<j} U_ij e_i),    e_j = w_j - ŵ_j.

This form (2307.13304) gives GPTQ's result from one Cholesky factor, without an inverse. The error it leaves,
tr(E H Eᵀ), is the sum of D_j times the squared rounding error of column j: D weighs the columns when a block's
scale is chosen. After the first sweep every column may be rounded again given all others (2309.01885), with
the scales regressed block by block: the same sweep with U_ij = H_ij / H_jj on both sides of the diagonal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.column_sweep import ColumnSweep, in_order
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.quantize import QuantizedMatrix, by_rows, check_blockwise, stacked
from rk_export.passes.numerics.threads import cpu_threads, one_thread

# A second moment that has no Cholesky factor, by rounding or by too few tokens, is damped so much more, up to
# this share of its mean eigenvalue.
_MOST_DAMPING, _DAMPING_STEP = 10.0, 10.0


def quantize_gptq(
    W: Tensor,
    spec: QuantSpec,
    second: Tensor,
    *,
    scale_dtype: torch.dtype = torch.float32,
    damping: float = 0.01,
    cross: Tensor | None = None,
    refinements: int = 1,
) -> QuantizedMatrix:
    """Quantize W (N, K), minimizing the error of its outputs on inputs of a given second moment.

    Args:
        W: (N, K).
        spec: Bits, block size and symmetry.
        second: E[x xᵀ] (K, K) of the inputs that the quantized matrix will read.
        scale_dtype: Float type of the stored scales.
        damping: Share of the mean eigenvalue added to every one; more where no Cholesky factor exists.
        cross: E[x₀ xᵀ] (K, K), x₀ the dense model's input: W is replaced by the map of x that comes closest
            to W x₀, so that the error of the layers before is made up for.
        refinements: Sweeps after the first that round each column again and regress the scales.

    Raises:
        TypeError: If the spec has no blocks.
        ValueError: If the second moment does not fit W, is not finite, or is no second moment at all.
        InputError: If a scale does not fit `scale_dtype`.
    """
    check_blockwise(spec)
    K = W.shape[1]
    if second.shape != (K, K):
        raise ValueError(f"a second moment of shape {tuple(second.shape)} for {K} columns")
    if cross is not None:
        metric = Metric.of(second, damping)
        W = metric.unweighted(metric.target(W, cross))
    second = second.to(W.device, torch.float32)
    order = _processing_order(second, spec.block_size)
    H = in_order(second, order, damping * float(second.diagonal().mean()) or 1.0)
    # From here on every matrix of K columns takes the place of another one: they may be half a gigabyte each.
    feedback = _upper_root(H)
    weights = feedback.diagonal().square()
    feedback.div_(feedback.diagonal().clone()).triu_(1)
    diagonal = H.diagonal().clone()
    pull = H.div_(diagonal).fill_diagonal_(0)
    parts = []
    with cpu_threads(1):
        for rows in by_rows(W):
            sweep = ColumnSweep.start(rows, spec, scale_dtype, order)
            sweep.first(feedback, weights)
            for _ in range(refinements):
                sweep.again(pull, diagonal)
            parts.append(sweep.result(K))
    return stacked(parts)


def _processing_order(second: Tensor, block: int) -> Tensor:
    """Return the columns, padded to whole blocks, in the order in which they are rounded.

    Blocks of large inputs come first, and large inputs first within a block: what is rounded late has no one
    left to make up for it. A block stays together, since it shares a scale.
    """
    size = second.diagonal()
    blocks = torch.nn.functional.pad(size, (0, -len(size) % block)).view(-1, block)
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    starts = block * torch.arange(len(blocks), device=size.device)
    order: Tensor = (inside + starts[:, None])[blocks.sum(1).argsort(descending=True, stable=True)]
    return order.flatten()


@one_thread()
def _upper_root(H: Tensor) -> Tensor:
    """Return the upper triangular R with H = R Rᵀ; H gets more damping in place where none exists.

    float32 is exact enough: its rounding is of order 1e-7 of H's trace, far below the damping.

    Raises:
        ValueError: If no damping helps.
    """
    mean = float(H.diagonal().mean())
    share = 0.01
    while True:
        root, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not int(failed) and bool(torch.isfinite(root).all()):
            upper: Tensor = root.flip(0, 1)
            return upper
        if share > _MOST_DAMPING or not math.isfinite(mean):
            raise ValueError("the second moment is not positive semidefinite, or not finite")
        H.diagonal().add_(share * mean)
        share *= _DAMPING_STEP
