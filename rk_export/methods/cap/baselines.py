"""Pruning without a low-rank part, in the form of CAP's choices: magnitude, and Wanda (2306.11695)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.matrix_id import MatrixId
from rk_export.memory import check_memory
from rk_export.methods.sparse_sites import check_source, linear_shapes, on_disk
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, index_dtype, rank_zero_factors
from rk_export.scratch import joined
from rk_export.source.protocol import Source


def magnitude(
    source: Source, keep: float, scope: Literal["global", "matrix"] = "matrix"
) -> dict[MatrixId, Parts]:
    """Keep the entries of largest magnitude.

    Args:
        source: The dense model.
        keep: Share of the entries that remain.
        scope: Compare entries of all matrices, or of one matrix at a time.
    """
    check_source(source, "cap")
    limit = None
    if scope == "global":
        entries = _entries(source)
        check_memory(
            8 * entries, "the entries of all matrices, compared", where="magnitude", fix="compare by matrix"
        )
        sizes = joined((W.abs().flatten() for _, W in _weights(source)), entries)
        limit = _limit(sizes, keep)
    parts = {}
    for place, W in _weights(source):
        size = W.abs()
        least = _limit(size.flatten(), keep) if limit is None else limit
        parts[place] = on_disk(sparse_parts(W, size >= least))
    return parts


def _entries(source: Source) -> int:
    """Return how many entries the matrices have."""
    return sum(rows * columns for rows, columns in linear_shapes(source).values())


def wanda(source: Source, keep: float, statistics: DenseStatistics) -> dict[MatrixId, Parts]:
    """Keep in every row the entries of largest |W_ij| √C_jj, the same number in each (2306.11695).

    Args:
        source: The dense model.
        keep: Share of the entries that remain.
        statistics: Of the dense model; C is the second moment of a matrix' inputs.
    """
    check_source(source, "cap")
    chosen = {}
    for place, W in _weights(source):
        score = W.abs() * statistics.second[place].diagonal().clamp_min(0).sqrt()
        count = max(1, int(keep * W.shape[1]))
        mask = torch.zeros_like(W, dtype=torch.bool)
        mask.scatter_(1, score.topk(count, dim=1).indices, True)
        chosen[place] = on_disk(sparse_parts(W, mask))
    return chosen


def sparse_parts(W: Tensor, mask: Tensor) -> Parts:
    """Return the entries of W (out, in) that a mask, bool (out, in), keeps, beside a low-rank part of rank 0."""
    shape = (W.shape[0], W.shape[1])
    indices = mask.flatten().nonzero()[:, 0]
    return Parts(*rank_zero_factors(shape, W), indices.to(index_dtype(shape)), W.flatten()[indices])


def _weights(source: Source) -> Iterator[tuple[MatrixId, Tensor]]:
    for layer in source.layers():
        for item in source.description.projections(layer.index):
            yield MatrixId(layer.index, item.path), layer.linear(item.path).weight.detach().clone()


def _limit(sizes: Tensor, keep: float) -> Tensor:
    """Return the smallest of the kept share of the largest values (values,)."""
    count = max(1, int(keep * len(sizes)))
    return sizes.kthvalue(len(sizes) - count + 1).values
