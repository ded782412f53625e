"""SSLC from a budget to parts: budgets are kept, and the allocation follows predicted loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from second_order import loss_increase

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.baselines import wanda
from rk_export.methods.sparse_sites import BYTES, PARAMETERS, Prices, linear_shapes
from rk_export.methods.sslc.choose import RANK_SHARES, candidates_of, sslc_parts, targets
from rk_export.methods.sslc.options import SslcOptions
from rk_export.options.ranks import Budget
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
Chosen = dict[MatrixId, Parts]
CPU = torch.device("cpu")


def _statistics(source: StoredModel, folder: Path, diagonal: bool = False) -> DenseStatistics:
    tokens = torch.randint(3, source.config.vocab_size, (16, 16), generator=torch.Generator().manual_seed(2))
    return dense_statistics(source, tokens, diagonal=diagonal, device=CPU, cache_dir=folder)


@pytest.fixture
def source(source_of: SourceOf) -> StoredModel:
    return source_of("qwen2")


@pytest.fixture
def statistics(source: StoredModel, tmp_path: Path) -> DenseStatistics:
    return _statistics(source, tmp_path)


def _numbers(source: StoredModel) -> int:
    return sum(rows * columns for rows, columns in linear_shapes(source).values())


def _predicted(source: StoredModel, chosen: Chosen, statistics: DenseStatistics) -> float:
    layers = source.load().get_submodule(source.architecture.layers)
    total = 0.0
    for (layer, path), parts in chosen.items():
        E = layers.get_submodule(f"{layer}.{path}").weight.detach() - parts.dense()
        place = MatrixId(layer, path)
        total += loss_increase(statistics.gradients[place], E, statistics.second[place], statistics.tokens)
    return total


def _chosen(source: StoredModel, budget: Budget, statistics: DenseStatistics, stages: int = 3) -> Chosen:
    return sslc_parts(source, budget, SslcOptions(keep=0.5, stages=stages), statistics=statistics, device=CPU)


@pytest.mark.parametrize("prices", [PARAMETERS, BYTES])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_budget_is_spent_and_not_exceeded(
    source: StoredModel, statistics: DenseStatistics, prices: Prices, share: float
) -> None:
    amount = share * prices.column * _numbers(source)
    budget = Budget("keep", share) if prices is PARAMETERS else Budget("size", amount)
    chosen = _chosen(source, budget, statistics)
    spent = sum(prices.total(parts.shape, parts.rank, parts.entries) for parts in chosen.values())
    assert {place: parts.shape for place, parts in chosen.items()} == linear_shapes(source)
    assert 0.97 * amount < spent <= amount
    assert len({parts.parameters for parts in chosen.values()}) > 3


def test_it_loses_less_than_wanda_and_more_stages_lose_less(
    source: StoredModel, statistics: DenseStatistics
) -> None:
    budget = Budget("keep", 0.5)
    baseline = _predicted(source, wanda(source, 0.5, statistics), statistics)
    one, four = (
        _predicted(source, _chosen(source, budget, statistics, stages), statistics) for stages in (1, 4)
    )
    assert four < one < 0.8 * baseline


def test_candidates_lose_less_the_more_they_hold(source: StoredModel, statistics: DenseStatistics) -> None:
    for place, target in targets(source, statistics, CPU):
        found = candidates_of(target, 0.5, statistics.gradients[place])
        assert len(set(found.ranks.tolist())) == len(RANK_SHARES)
        for rank in set(found.ranks.tolist()):
            mine = found.ranks == rank
            assert (found.entries[mine][1:] >= found.entries[mine][:-1]).all()
            assert (found.losses[mine][1:] <= found.losses[mine][:-1]).all()


def test_diagonals_of_output_curvature_are_enough(source: StoredModel, tmp_path: Path) -> None:
    statistics = _statistics(source, tmp_path, diagonal=True)
    chosen = _chosen(source, Budget("keep", 0.5), statistics)
    assert sum(parts.parameters for parts in chosen.values()) <= 0.5 * _numbers(source)


def test_experts_and_encoders_are_refused(source_of: SourceOf, statistics: DenseStatistics) -> None:
    with pytest.raises(InputError, match="experts"):
        _chosen(source_of("mixtral"), Budget("keep", 0.5), statistics)


@pytest.mark.parametrize(("kind", "value"), [("keep", 1e-9), ("size", 1e12)])
def test_budgets_that_leave_no_choice_are_refused(
    source: StoredModel, statistics: DenseStatistics, kind: str, value: float
) -> None:
    with pytest.raises(InputError) as refused:
        _chosen(source, Budget(kind, value), statistics)  # type: ignore[arg-type]
    assert refused.value.where == f"--{kind}"


def test_a_share_or_a_size_says_how_much_stays() -> None:
    with pytest.raises(InputError, match="nothing says how much stays"):
        SslcOptions()
    with pytest.raises(InputError, match="keep and size both say"):
        SslcOptions(keep=0.5, size=1e6)
    with pytest.raises(InputError, match="stages"):
        SslcOptions(keep=0.5, stages=0)
