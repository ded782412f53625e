"""A matrix as low rank plus sparse, W ~ U V + S (2505.03801), and which columns of S are cheaper stored dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INT32_ENTRIES = 2**31


@dataclass(frozen=True)
class Parts:
    """W (out, in) ~ up @ down + S.

    Args:
        up: U' = U √σ (out, r); r may be 0.
        down: V' = √σ Vᵀ (r, in).
        indices: Places of S' entries, row-major in (out, in): row * in + column; strictly ascending, int32 or
            int64 (nnz,).
        values: The entries (nnz,), of `up`'s dtype.

    Raises:
        ValueError: If shapes or dtypes do not go together, or the indices are not ascending places of the matrix.
    """

    up: Tensor
    down: Tensor
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"factors of {tuple(self.up.shape)} and {tuple(self.down.shape)} do not multiply"
            )
        if self.indices.ndim != 1 or self.indices.shape != self.values.shape:
            raise ValueError(f"{tuple(self.indices.shape)} indices, {tuple(self.values.shape)} values")
        if self.indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"indices of {self.indices.dtype}")
        if len(self.indices) and (
            int(self.indices[0]) < 0
            or int(self.indices[-1]) >= self.up.shape[0] * self.down.shape[1]
            or not bool((self.indices[1:] > self.indices[:-1]).all())
        ):
            raise ValueError(f"the indices are not ascending places of a {self.shape} matrix")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.up.shape[1]

    @property
    def entries(self) -> int:
        """Stored entries of S."""
        return len(self.indices)

    @property
    def parameters(self) -> int:
        """Stored numbers, as the paper counts them: r (out + in) of the factors and one for each entry."""
        return self.rank * sum(self.shape) + self.entries

    def sparse(self) -> Tensor:
        """Return S (out, in)."""
        return scattered(self.shape, self.indices, self.values)

    def dense(self) -> Tensor:
        """Return up @ down + S (out, in)."""
        return self.up @ self.down + self.sparse()


def scattered(shape: tuple[int, int], indices: Tensor, values: Tensor) -> Tensor:
    """Return the (out, in) matrix that is zero but for `values` at flat row-major `indices`."""
    flat = values.new_zeros(shape[0] * shape[1])
    flat[indices.long()] = values
    return flat.view(shape)


def index_dtype(shape: tuple[int, int]) -> torch.dtype:
    """Return the smallest dtype of flat indices into an (out, in) matrix: int32 or int64."""
    return torch.int32 if shape[0] * shape[1] <= _INT32_ENTRIES else torch.int64


def rank_zero_factors(shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of rank 0, (out, 0) and (0, in), with the dtype and device of `like`."""
    return like.new_zeros(shape[0], 0), like.new_zeros(0, shape[1])


@dataclass(frozen=True)
class SplitColumns:
    """S as dense columns and the entries that remain; no place stands in both.

    Args:
        columns: Indices of the dense columns, ascending, int64 (c,).
        weights: These columns of S (out, c).
        indices: Places of the remaining entries, as in `Parts`.
        values: The remaining entries.
    """

    columns: Tensor
    weights: Tensor
    indices: Tensor
    values: Tensor


def split_columns(
    shape: tuple[int, int], indices: Tensor, values: Tensor, *, dense_bytes: float, sparse_bytes: float
) -> SplitColumns:
    """Take the columns out of S that are so full that dense ones are smaller.

    A column of n entries becomes dense where out · `dense_bytes` < n · `sparse_bytes`; at equal bytes too, as a
    dense column multiplies faster.

    Args:
        shape: (out, in) of S.
        indices: Flat places, as in `Parts`.
        values: The entries.
        dense_bytes: Bytes of one number of a dense column; whatever a column costs beside goes in here, as
            bytes / out.
        sparse_bytes: Bytes of one sparse entry, value and index.

    Raises:
        ValueError: If a price is not positive.
    """
    if dense_bytes <= 0 or sparse_bytes <= 0:
        raise ValueError(f"{dense_bytes} bytes of a dense number, {sparse_bytes} of a sparse entry")
    out, width = shape
    column = indices.long() % width
    counts = torch.bincount(column, minlength=width)
    full = (counts * sparse_bytes >= out * dense_bytes) & (counts > 0)
    columns, inside = full.nonzero()[:, 0], full[column]
    position = torch.zeros_like(counts)
    position[columns] = torch.arange(len(columns), device=columns.device)
    weights = values.new_zeros(out, len(columns))
    weights[indices[inside].long() // width, position[column[inside]]] = values[inside]
    return SplitColumns(columns, weights, indices[~inside], values[~inside])
