"""Well-conditioned choice of k rows of a tall matrix B (out, k), rows taken singly or in pairs.

Greedy volume maximization, as QR with column pivoting of Bᵀ does, on Gaussian sketches of the part that is not
spanned yet (1509.06820), so that nearly all work is in matrix products; then exchanges of a chosen group for
another one while that enlarges the volume by more than a bound (Gu and Eisenstat, 1996), which bounds the
coefficients of the other rows.
"""

from __future__ import annotations

import torch
from scipy.linalg import qr
from torch import Tensor

from rk_export.passes.numerics.threads import one_thread

# Dimensions spanned from one sketch, and sketch columns beyond them.
BLOCK, OVERSAMPLING = 32, 8


def pivoted_rows(B: Tensor) -> Tensor:
    """Return the indices (k,) of k well-conditioned rows of B (out, k): QR with column pivoting of Bᵀ.

    LAPACK's blocked routine on the CPU, whatever B's device: on a 1536 x 500 matrix it took a third of the time of
    `greedy_groups`, which serves pairs.
    """
    _, pivots = qr(B.T.cpu().numpy(), mode="r", pivoting=True, check_finite=False)
    return torch.from_numpy(pivots[: B.shape[1]].astype("int64")).to(B.device)


@one_thread()
def greedy_groups(B: Tensor, seed: int = 0) -> Tensor:
    """Return the indices (k / g,) of groups whose rows span all k dimensions and are well-conditioned.

    Args:
        B: Groups of g = 1 or 2 rows, float64 (groups, g, k); k a multiple of g, at most all rows.
        seed: Of the sketches.
    """
    groups, size, rank = B.shape
    generator = torch.Generator().manual_seed(seed)
    open_groups = torch.ones(groups, dtype=torch.bool, device=B.device)
    basis = B.new_zeros(rank, 0)
    chosen: list[Tensor] = []
    block = max(BLOCK // size, 1) * size
    for spanned in range(0, rank, block):
        width = min(block, rank - spanned)
        sketch = torch.randn(rank, width + OVERSAMPLING, generator=generator, dtype=B.dtype).to(B.device)
        picked = _pick(B @ _without(sketch, basis), open_groups, width // size)
        rows = _without(_without(B[picked].flatten(0, 1).mT, basis), basis)
        basis = torch.cat([basis, torch.linalg.qr(rows).Q], dim=1)
        chosen.append(picked)
    return torch.cat(chosen)


def _without(X: Tensor, basis: Tensor) -> Tensor:
    """Return the part of the columns of X that is orthogonal to the basis."""
    return X - basis @ (basis.mT @ X)


@one_thread()
def _pick(sketch: Tensor, open_groups: Tensor, count: int) -> Tensor:
    """Pick `count` groups of the sketch (groups, g, s) one after the other, each of largest remaining volume.

    Picked groups are closed in `open_groups`.
    """
    picked = []
    for _ in range(count):
        volume = _squared_volume(sketch).masked_fill(~open_groups, -1)
        best = volume.argmax()
        open_groups[best] = False
        directions = torch.linalg.qr(sketch[best].mT).Q
        sketch = sketch - (sketch @ directions) @ directions.mT
        picked.append(best)
    return torch.stack(picked)


def _squared_volume(groups: Tensor) -> Tensor:
    """Return the squared volume that the rows of each group (n, g, s) span."""
    if groups.shape[1] == 1:
        return groups.square().sum((1, 2))
    return _determinant(groups @ groups.mT)


@one_thread()
def exchange(C: Tensor, size: int, bound: float) -> list[tuple[int, int]]:
    """Exchange groups while that multiplies the volume of the chosen rows by more than `bound`.

    Args:
        C: Coefficients of the other rows by the chosen ones, (others, k), rows and columns group by group;
            changed in place to those after the exchanges.
        size: g, rows in a group.
        bound: Above 1. With single rows no coefficient exceeds it afterwards.

    Returns:
        The exchanges in order: position among the other groups, position among the chosen ones.
    """
    swaps: list[tuple[int, int]] = []
    while C.numel():
        volume = _minors(C, size)
        flat = int(volume.argmax())
        other, chosen = divmod(flat, volume.shape[1])
        if float(volume[other, chosen]) <= bound:
            return swaps
        rows = slice(other * size, (other + 1) * size)
        columns = slice(chosen * size, (chosen + 1) * size)
        identity = torch.zeros(size, C.shape[1], dtype=C.dtype, device=C.device)
        identity[:, columns] = torch.eye(size, dtype=C.dtype, device=C.device)
        # In the new coordinates the entering rows are unit vectors, and the leaving ones take their place.
        change = torch.linalg.solve(C[rows, columns], C[rows] - identity)
        C -= C[:, columns] @ change
        C[rows] = identity - change
        swaps.append((other, chosen))
    return swaps


def _minors(C: Tensor, size: int) -> Tensor:
    """Return by how much each exchange multiplies the volume, (other groups, chosen groups)."""
    if size == 1:
        return C.abs()
    blocks = C.view(C.shape[0] // size, size, C.shape[1] // size, size).transpose(1, 2)
    return _determinant(blocks).abs()


def _determinant(blocks: Tensor) -> Tensor:
    """Return the determinants of (..., 2, 2) matrices."""
    return blocks[..., 0, 0] * blocks[..., 1, 1] - blocks[..., 0, 1] * blocks[..., 1, 0]
