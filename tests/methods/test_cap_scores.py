"""The largest scores of CAP's pools: scores against the loss they predict, budgets, baselines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from second_order import loss_increase
from sparse_plans import cost_of
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.baselines import magnitude, wanda
from rk_export.methods.cap.pools import Pool, Pools, pool_of
from rk_export.methods.cap.scores import (
    curvature_score,
    directions_only,
    energy_score,
    largest_of_each,
    largest_scores,
)
from rk_export.methods.sparse_sites import BYTES, PARAMETERS, Prices, linear_shapes
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.numerics.rpca import rpca
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
TOKENS = 64


def _moment(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / size + root[:, :1] @ root[:, :1].T


def _statistics(shapes: dict[MatrixId, tuple[int, int]], *, diagonal: bool = False) -> DenseStatistics:
    second = {place: _moment(shape[1], 10 + i) for i, (place, shape) in enumerate(shapes.items())}
    gradients = {place: _moment(shape[0], 50 + i) for i, (place, shape) in enumerate(shapes.items())}
    if diagonal:
        gradients = {place: G.diagonal().contiguous() for place, G in gradients.items()}
    return DenseStatistics(second, {}, {}, gradients, TOKENS)


def _pools() -> dict[MatrixId, Pool]:
    pools = {}
    for index, shape in enumerate([(12, 8), (8, 20), (10, 10)]):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        split = rpca(W, 15)
        pools[index, "m"] = pool_of(W, split.low, split.exact_sparse(W))
    return pools


def _shapes(pools: Pools) -> dict[MatrixId, tuple[int, int]]:
    return {place: pool.parts.shape for place, pool in pools.items()}


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_curvatures_score_is_what_the_loss_rises_without_a_candidate(diagonal: bool) -> None:
    pools = _pools()
    statistics = _statistics(_shapes(pools), diagonal=diagonal)
    score = curvature_score(BYTES, statistics)
    for place, pool in pools.items():
        found, price = score(place, pool), pool.prices(BYTES)
        for index in (0, pool.parts.rank - 1, pool.parts.rank, len(pool) - 1):
            mask = torch.zeros(len(pool), dtype=torch.bool)
            mask[index] = True
            expected = loss_increase(
                statistics.gradients[place], pool.selected(mask).dense(), statistics.second[place], TOKENS
            )
            assert float(found[index] * price[index]) == pytest.approx(expected, rel=1e-4)


def test_the_energys_score_is_relative_to_the_matrix() -> None:
    pool = _pools()[0, "m"]
    score, place = energy_score(PARAMETERS), (0, "m")
    twice = Pool(Parts(2 * pool.parts.up, 3 * pool.parts.down, pool.parts.indices, 6 * pool.parts.values))
    torch.testing.assert_close(score(place, twice), score(place, pool))
    squares = pool.parts.values.square() / pool.parts.dense().square().mean()
    torch.testing.assert_close(score(place, pool)[pool.parts.rank :], squares)


@pytest.mark.parametrize("prices", [PARAMETERS, BYTES])
def test_the_choice_spends_the_budget_on_the_largest_scores(prices: Prices) -> None:
    pools = _pools()
    score = curvature_score(prices, _statistics(_shapes(pools)))
    total = sum(float(pool.prices(prices).sum()) for pool in pools.values())
    chosen = largest_scores(score, pools, 0.4 * total, prices)
    spent = sum(cost_of(parts, prices) for parts in chosen.values())
    assert 0.4 * total - 32 * prices.number < spent <= 0.4 * total
    kept, lost = [], []
    for place, pool in pools.items():
        found = score(place, pool)[pool.parts.rank :]
        inside = torch.isin(pool.parts.indices, chosen[place].indices)
        kept.append(found[inside])
        lost.append(found[~inside])
    # All entries have one price: none that was left out is worth more than one that was taken.
    assert float(torch.cat(kept).min()) >= float(torch.cat(lost).max())


def test_directions_alone() -> None:
    pools = _pools()
    score = directions_only(curvature_score(PARAMETERS, _statistics(_shapes(pools))))
    chosen = largest_scores(score, pools, 60, PARAMETERS)
    assert sum(parts.entries for parts in chosen.values()) == 0
    assert 0 < sum(parts.parameters for parts in chosen.values()) <= 60


def test_every_matrix_may_have_its_own_share() -> None:
    pools = _pools()
    numbers = sum(rows * columns for rows, columns in _shapes(pools).values())
    chosen = largest_of_each(energy_score(PARAMETERS), pools, 0.3 * numbers, PARAMETERS)
    for parts in chosen.values():
        share = parts.parameters / (parts.shape[0] * parts.shape[1])
        assert 0.28 <= share <= 0.3


@pytest.mark.parametrize("scope", ["global", "matrix"])
def test_magnitude_keeps_the_largest_entries(source_of: SourceOf, scope: str) -> None:
    source = source_of("llama")
    chosen = magnitude(source, 0.3, scope)  # type: ignore[arg-type]
    shapes = linear_shapes(source)
    kept = {place: parts.entries / (shapes[place][0] * shapes[place][1]) for place, parts in chosen.items()}
    layers = source.load().get_submodule(source.architecture.layers)
    smallest_kept, largest_lost = {}, {}
    for (layer, path), parts in chosen.items():
        W = layers.get_submodule(f"{layer}.{path}").weight
        mask = parts.dense() != 0
        assert torch.equal(parts.dense(), W * mask)
        smallest_kept[layer, path] = float(W.abs()[mask].min())
        largest_lost[layer, path] = float(W.abs()[~mask].max())
    if scope == "global":
        assert min(smallest_kept.values()) >= max(largest_lost.values())
        total = sum(rows * columns for rows, columns in shapes.values())
        assert sum(parts.entries for parts in chosen.values()) == round(0.3 * total)
    else:
        assert all(smallest_kept[place] >= largest_lost[place] for place in chosen)
        assert all(share == pytest.approx(0.3, abs=1e-3) for share in kept.values())


def test_wanda_weighs_columns_and_keeps_rows_equally_full(source_of: SourceOf) -> None:
    source = source_of("llama")
    statistics = _statistics(linear_shapes(source))
    layers = source.load().get_submodule(source.architecture.layers)
    for (layer, path), parts in wanda(source, 0.25, statistics).items():
        W = layers.get_submodule(f"{layer}.{path}").weight
        score = W.abs() * statistics.second[layer, path].diagonal().sqrt()
        mask = parts.dense() != 0
        assert mask.sum(1).tolist() == [W.shape[1] // 4] * W.shape[0]
        kept = torch.where(mask, score, torch.inf).amin(1)
        lost = torch.where(mask, -torch.inf, score).amax(1)
        assert bool((kept >= lost).all())
        assert torch.equal(parts.dense(), W * mask)


def test_baselines_refuse_experts(source_of: SourceOf) -> None:
    with pytest.raises(InputError, match="experts"):
        magnitude(source_of("mixtral"), 0.5)
