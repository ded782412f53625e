"""Our allocation over mixtures: what a matrix may become, what it costs, and that it beats the candidates' choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from second_order import loss_increase
from sparse_plans import cost_of
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.errors import InputError
from rk_export.methods.cap import mixture as cap_mixture
from rk_export.methods.cap.choose import cap_parts
from rk_export.methods.cap.mixture import (
    Mixtures,
    cheapest,
    mixture_selection,
    mixtures_of,
    offered_mixtures,
    refitted_parts,
)
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.cap.pools import make_pools
from rk_export.methods.cap.scores import curvature_score, largest_scores
from rk_export.methods.sparse_sites import BYTES, PARAMETERS, Prices, linear_shapes
from rk_export.options.ranks import Budget
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")


@pytest.fixture
def source(source_of: SourceOf) -> StoredModel:
    return source_of("qwen2")


@pytest.fixture
def statistics(source: StoredModel, tmp_path: Path) -> DenseStatistics:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, source.config.vocab_size, (6, 16), generator=generator)
    return dense_statistics(source, tokens, diagonal=False, device=CPU, cache_dir=tmp_path)


def _numbers(source: StoredModel) -> int:
    return sum(rows * columns for rows, columns in linear_shapes(source).values())


def _predicted(
    source: StoredModel, chosen: dict[tuple[int, str], Parts], statistics: DenseStatistics
) -> float:
    layers = source.load().get_submodule(source.architecture.layers)
    total = 0.0
    for (layer, path), parts in chosen.items():
        E = layers.get_submodule(f"{layer}.{path}").weight.detach() - parts.dense()
        place = (layer, path)
        total += loss_increase(statistics.gradients[place], E, statistics.second[place], statistics.tokens)
    return total


def _identity(rows: int, columns: int) -> Curvature:
    return Curvature(Inputs(torch.eye(columns)), {"m": torch.eye(rows)})


def test_mixtures_cost_no_more_than_the_dense_matrix_and_lose_less_the_more_they_hold() -> None:
    W: Tensor = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    mixtures = mixtures_of(W, _identity(20, 30))
    costs = mixtures.choices(PARAMETERS).costs
    assert costs.max() == 600
    assert (int(mixtures.ranks[0]), int(mixtures.entries[0]), float(mixtures.losses[0])) == (0, 600, 0.0)
    alone = mixtures.entries == 0
    assert bool((mixtures.losses[alone].diff() <= 1e-9).all())
    assert int(mixtures.ranks[alone].max()) == 600 // 50


def test_in_bytes_a_full_sparse_matrix_costs_its_columns() -> None:
    one = torch.zeros(1, dtype=torch.float64)
    mixtures = Mixtures((4, 5), torch.tensor([0]), torch.tensor([20]), one)
    assert mixtures.choices(BYTES).costs.tolist() == [40.0]
    fewer = Mixtures((4, 5), torch.tensor([2]), torch.tensor([10]), one)
    assert fewer.choices(BYTES).costs.tolist() == [2 * 9 * 4 + 10 * 3]


@pytest.mark.parametrize("prices", [PARAMETERS, BYTES])
def test_the_budget_is_spent_on_fitted_mixtures(
    source: StoredModel, statistics: DenseStatistics, prices: Prices, tmp_path: Path
) -> None:
    offered = offered_mixtures(source, statistics, CPU, tmp_path)
    assert {place: item.shape for place, item in offered.items()} == linear_shapes(source)
    budget = 0.5 * prices.column * _numbers(source)
    chosen = mixture_selection(source, offered, budget, prices, statistics, CPU, tmp_path)
    spent = sum(cost_of(parts, prices) for parts in chosen.values())
    assert 0.95 * budget < spent <= budget
    assert len({parts.parameters for parts in chosen.values()}) > 3


def test_mixtures_lose_less_than_cap_s_candidates_and_refitting_helps_those(
    source: StoredModel, statistics: DenseStatistics, tmp_path: Path
) -> None:
    pools = make_pools(source, 8, CPU, tmp_path)
    budget = 0.5 * _numbers(source)
    from_pools = largest_scores(curvature_score(PARAMETERS, statistics), pools, budget, PARAMETERS)
    refitted = refitted_parts(source, from_pools, statistics, CPU)
    offered = offered_mixtures(source, statistics, CPU, tmp_path)
    mixed = mixture_selection(source, offered, budget, PARAMETERS, statistics, CPU, tmp_path)
    assert {place: item.parameters for place, item in refitted.items()} == {
        place: item.parameters for place, item in from_pools.items()
    }
    losses = [_predicted(source, chosen, statistics) for chosen in (mixed, refitted, from_pools)]
    assert losses[0] < losses[1] < losses[2]


def test_the_cheapest_mixture_is_bought_before_nothing_is(
    source: StoredModel, statistics: DenseStatistics, tmp_path: Path
) -> None:
    offered = offered_mixtures(source, statistics, CPU, tmp_path)
    least = cheapest(offered, PARAMETERS)
    chosen = mixture_selection(source, offered, least, PARAMETERS, statistics, CPU, tmp_path)
    assert sum(parts.parameters for parts in chosen.values()) == least
    with pytest.raises(InputError, match="keeps nothing") as refused:
        cap_parts(
            source,
            Budget("size", 3.0),
            CapOptions(size=3.0, selector="auction"),
            tokens=None,
            statistics=statistics,
            device=CPU,
            cache_dir=tmp_path,
        )
    assert refused.value.where == "--size"


def test_experts_are_refused(source_of: SourceOf, statistics: DenseStatistics) -> None:
    with pytest.raises(InputError, match="experts"):
        offered_mixtures(source_of("mixtral"), statistics, CPU)


def test_offers_and_fits_are_read_from_disk(
    source: StoredModel, statistics: DenseStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 0.5 * _numbers(source)

    def chosen(share: float = 1.0) -> dict[tuple[int, str], Parts]:
        offered = offered_mixtures(source, statistics, CPU, tmp_path)
        return mixture_selection(source, offered, share * budget, PARAMETERS, statistics, CPU, tmp_path)

    first = chosen()
    monkeypatch.setattr(cap_mixture, "mixtures_of", None)
    other = chosen(0.5)  # of the same offers
    assert sum(item.parameters for item in other.values()) < sum(item.parameters for item in first.values())
    monkeypatch.setattr(cap_mixture, "fitted_mixture", None)
    again = chosen()
    assert all(torch.equal(item.dense(), again[place].dense()) for place, item in first.items())
    changed = replace(statistics, tokens=statistics.tokens + 1)
    with pytest.raises(TypeError):
        offered_mixtures(source, changed, CPU, tmp_path)
