"""Low rank plus sparse as a value: what it stands for, what it refuses, which columns become dense."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rk_export.passes.numerics.low_rank_plus_sparse import (
    Parts,
    index_dtype,
    rank_zero_factors,
    scattered,
    split_columns,
)

SHAPE = (5, 4)


def _sparse(seed: int = 0, density: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(SHAPE, generator=generator) * (torch.rand(SHAPE, generator=generator) < density)
    indices = S.flatten().nonzero()[:, 0].to(torch.int32)
    return S, indices, S.flatten()[indices.long()]


def test_dense_is_the_product_and_the_entries() -> None:
    S, indices, values = _sparse()
    up, down = torch.randn(5, 2), torch.randn(2, 4)
    parts = Parts(up, down, indices, values)
    torch.testing.assert_close(parts.dense(), up @ down + S)
    assert (parts.shape, parts.rank, parts.entries) == (SHAPE, 2, int((S != 0).sum()))
    assert parts.parameters == 2 * 9 + parts.entries


def test_either_part_may_be_empty() -> None:
    S, indices, values = _sparse()
    up, down = rank_zero_factors(SHAPE, values)
    torch.testing.assert_close(Parts(up, down, indices, values).dense(), S)
    nothing = Parts(up, down, indices[:0], values[:0])
    assert not nothing.dense().any()
    assert nothing.parameters == 0


@pytest.mark.parametrize(
    "indices", [[3, 1], [1, 1], [-1, 2], [0, 20]], ids=["descending", "twice", "negative", "beyond"]
)
def test_indices_that_are_no_ascending_places_are_refused(indices: list[int]) -> None:
    up, down = rank_zero_factors(SHAPE, torch.zeros(1))
    with pytest.raises(ValueError, match="ascending places"):
        Parts(up, down, torch.tensor(indices), torch.ones(2))


def test_shapes_that_do_not_go_together_are_refused() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not multiply"):
        Parts(torch.zeros(5, 2), torch.zeros(3, 4), none, torch.zeros(0))
    with pytest.raises(ValueError, match="values"):
        Parts(torch.zeros(5, 2), torch.zeros(2, 4), none, torch.zeros(1))
    with pytest.raises(ValueError, match="float32"):
        Parts(torch.zeros(5, 2), torch.zeros(2, 4), torch.zeros(0), torch.zeros(0))


def test_index_dtype_is_wide_only_where_it_must_be() -> None:
    assert index_dtype((2**16, 2**15)) is torch.int32
    assert index_dtype((2**16, 2**15 + 1)) is torch.int64


def test_full_columns_become_dense_at_the_break_even() -> None:
    S = torch.zeros(5, 4)
    S[:, 1] = torch.arange(1.0, 6)
    S[:4, 3] = 7.0
    S[0, 0] = 2.0
    indices = S.flatten().nonzero()[:, 0]
    values = S.flatten()[indices]
    # 5 numbers of 4 bytes against 4 or 5 entries of 5 bytes: equal at four entries.
    split = split_columns((5, 4), indices, values, dense_bytes=4, sparse_bytes=5)
    assert split.columns.tolist() == [1, 3]
    torch.testing.assert_close(split.weights, S[:, [1, 3]])
    assert split.indices.tolist() == [0]
    dearer = split_columns((5, 4), indices, values, dense_bytes=4.01, sparse_bytes=5)
    assert dearer.columns.tolist() == [1]


@pytest.mark.parametrize("dense_bytes", [0.5, 2.0, 4.0, 100.0])
def test_columns_and_entries_add_up_to_the_sparse_part(dense_bytes: float) -> None:
    S, indices, values = _sparse(seed=1, density=0.7)
    split = split_columns(SHAPE, indices, values, dense_bytes=dense_bytes, sparse_bytes=5)
    total = scattered(SHAPE, split.indices, split.values)
    assert not total[:, split.columns].any()
    total[:, split.columns] = split.weights
    torch.testing.assert_close(total, S)
    assert split.indices.dtype is torch.int32


def test_an_empty_sparse_part_has_no_dense_column() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    split = split_columns(SHAPE, none, torch.zeros(0), dense_bytes=1e-9, sparse_bytes=5)
    assert split.columns.shape == (0,)
    assert split.weights.shape == (5, 0)


def test_prices_must_be_positive() -> None:
    _, indices, values = _sparse()
    with pytest.raises(ValueError, match="bytes"):
        split_columns(SHAPE, indices, values, dense_bytes=0, sparse_bytes=5)
