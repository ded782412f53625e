"""Narrower value heads: the map of a KV group from values to outputs, at a lower rank.

The values v of a group feed its query heads h, which add W_O^h Σ a v to the output, a the attention weights.
Values L v of r dimensions and matrices W_O^h R in place of W_O^h truncate that map to rank r (A3 2505.12942 and
MoDeGPT 2408.09632 truncate the same product).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.pruning import Reduction, refit
from rk_export.passes.numerics.threads import one_thread


@dataclass(frozen=True)
class NarrowValues:
    """Value heads of r dimensions.

    Args:
        down: L (groups, r, dim), float64.
        output: The new output projection (out, heads * r), in the old one's dtype.
        error: Relative error of the output projection's result.
    """

    down: Tensor
    output: Tensor
    error: float

    def narrowed(self, values: Tensor) -> Tensor:
        """Return L times the rows of all groups' values, (groups * dim, n) -> (groups * r, n)."""
        groups, _, dim = self.down.shape
        by_group = values.to(torch.float64).reshape(groups, dim, -1)
        return (self.down @ by_group).flatten(0, 1)


def narrow_values(W: Tensor, H: Tensor, groups: int, dim: int, rank: int) -> NarrowValues:
    """Return value heads of `rank` dimensions and the output projection that reads them.

    The basis of a group minimizes the error of its heads, each by itself, under the mean of their second
    moments; the output projection is refitted under all of H.

    Args:
        W: The output projection (out, heads * dim), heads of one group side by side.
        H: Second moment (heads * dim, heads * dim) of what it reads.
        groups: KV groups.
        dim: Width of a value head.
        rank: The new width, at most dim.
    """
    heads = W.shape[1] // dim
    blocks = W.T.to(torch.float64).view(groups, heads // groups, dim, -1)  # (groups, heads of one, dim, out)
    wide = H.to(torch.float64)
    own = torch.stack([wide[i : i + dim, i : i + dim] for i in range(0, len(wide), dim)])
    metrics = own.view(groups, heads // groups, dim, dim).mean(1)
    maps = [
        _basis(torch.einsum("hik,hjk->ij", outputs, outputs), metric, rank)
        for outputs, metric in zip(blocks, metrics, strict=True)
    ]
    down, up = (torch.stack(parts) for parts in zip(*maps, strict=True))
    start = (blocks.mT @ up[:, None]).permute(2, 0, 1, 3).flatten(1)  # (out, heads * r)
    L = _block_diagonal(down.repeat_interleave(heads // groups, 0))
    inputs = Reduction.of_map(wide, L)
    output = refit(W, start, inputs)
    return NarrowValues(down, output, inputs.error(W, output))


def value_moments(values: Tensor, second: Tensor, groups: int, heads: int) -> Tensor:
    """Return the second moment of attention's output as far as the values' own tells.

    Every head of a group is taken to pass its values on as they are, and heads not to be correlated.

    Args:
        values: W_V (groups * dim, in).
        second: Second moment of its input (in, in).
        groups: KV groups.
        heads: Query heads.
    """
    wide = values.to(torch.float64).reshape(groups, -1, values.shape[1])
    own = wide @ second.to(torch.float64) @ wide.mT
    return _block_diagonal(own.repeat_interleave(heads // groups, 0))


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Return the matrix (n * rows, n * columns) with the blocks (n, rows, columns) on its diagonal."""
    count, rows, columns = blocks.shape
    whole = blocks.new_zeros(count, rows, count, columns)
    index = torch.arange(count, device=blocks.device)
    whole[index, :, index] = blocks
    return whole.view(count * rows, count * columns)


@one_thread()
def _basis(outputs: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return L (rank, dim) and R (dim, rank) that minimize E‖O (v - R L v)‖².

    Args:
        outputs: OᵀO (dim, dim), O the stacked output blocks of a group's heads.
        metric: E[v vᵀ] (dim, dim).
        rank: Width of the reduced values.
    """
    values, vectors = torch.linalg.eigh(metric)
    floor = values[-1].clamp_min(torch.finfo(torch.float64).tiny) * torch.finfo(torch.float32).eps
    root = values.clamp_min(floor).sqrt()
    back, forth = vectors * root, vectors / root
    leading = torch.linalg.eigh(back.T @ outputs @ back).eigenvectors.flip(1)[:, :rank]
    return leading.T @ forth.T, back @ leading
