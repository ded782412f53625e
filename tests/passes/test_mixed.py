"""Low rank beside sparse entries: predicted losses against fitted ones, optimality, exact counts."""

from __future__ import annotations

import pytest
import torch
from second_order import loss_increase
from torch import Tensor

from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, rank_zero_factors
from rk_export.passes.numerics.metric import DAMPING
from rk_export.passes.numerics.mixed import entry_weights, fitted_mixture, largest, mixture_losses, refitted

OUT, IN = 14, 10


def _moment(size: int, seed: int) -> Tensor:
    root = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / size


def _curvature() -> Curvature:
    return Curvature(Inputs(_moment(IN, 1)), {"m": _moment(OUT, 2)})


def _damped(M: Tensor) -> Tensor:
    """Return a moment with the damping that every metric adds."""
    return M + DAMPING * M.diagonal().mean() * torch.eye(len(M))


def _matrix(seed: int = 3) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def test_loss_and_weights_are_those_of_the_curvature() -> None:
    curvature, E = _curvature(), _matrix()
    expected = loss_increase(_damped(_moment(OUT, 2)), E, _damped(_moment(IN, 1)), 1)
    assert curvature.loss(E) == pytest.approx(expected, rel=1e-4)
    single = torch.zeros(OUT, IN)
    single[5, 7] = 2.0
    weight = float(entry_weights(curvature)[5, 7])
    assert curvature.loss(single) == pytest.approx(0.5 * 4 * weight, rel=1e-4)


@pytest.mark.parametrize("entries", [0, 30, OUT * IN])
def test_predicted_losses_are_those_of_a_fit_without_alternation(entries: int) -> None:
    W, curvature = _matrix(), _curvature()
    losses = mixture_losses(W, curvature, [entries])[0]
    assert losses.shape == (IN + 1,)
    for rank in (0, 1, 4, IN):
        parts = fitted_mixture(W, curvature, rank, entries, rounds=0)
        assert (parts.rank, parts.entries) == (rank, entries)
        assert curvature.loss(W - parts.dense()) == pytest.approx(float(losses[rank]), rel=1e-3, abs=1e-6)


def test_alternation_lowers_the_loss_and_keeps_the_counts() -> None:
    W, curvature = _matrix(), _curvature()
    losses = []
    for rounds in (0, 1, 4):
        parts = fitted_mixture(W, curvature, 2, 40, rounds=rounds)
        assert (parts.rank, parts.entries) == (2, 40)
        losses.append(curvature.loss(W - parts.dense()))
    assert losses[0] > losses[1] >= losses[2]


def test_planted_parts_are_found() -> None:
    low = _matrix(4)[:, :1] @ _matrix(5)[:1]
    sparse = torch.zeros(OUT, IN)
    sparse[[1, 6, 12], [9, 0, 4]] = torch.tensor([30.0, -40.0, 35.0])
    curvature = Curvature(Inputs(torch.eye(IN)), {"m": torch.eye(OUT)})
    parts = fitted_mixture(low + sparse, curvature, 1, 3, rounds=30)
    torch.testing.assert_close(parts.dense(), low + sparse, rtol=1e-3, atol=1e-3)
    assert parts.indices.tolist() == [19, 60, 124]


def test_no_low_rank_part_beside_the_entries_is_better() -> None:
    W, curvature = _matrix(), _curvature()
    parts = Parts(torch.zeros(OUT, 3), torch.zeros(3, IN), torch.tensor([0, 20]), torch.ones(2))
    found = refitted(W, curvature, parts)
    assert (found.rank, found.entries) == (3, 2)
    best = curvature.loss(W - found.dense())
    for seed in range(20):
        noise = torch.Generator().manual_seed(100 + seed)
        up = found.up + 0.01 * torch.randn(found.up.shape, generator=noise)
        down = found.down + 0.01 * torch.randn(found.down.shape, generator=noise)
        assert curvature.loss(W - Parts(up, down, found.indices, found.values).dense()) > best


def test_the_loss_adds_up_over_members() -> None:
    """Members do not weigh each other's errors: G is block-diagonal, in whole or by its diagonal."""
    C, G, E = _moment(IN, 1), _moment(OUT, 2), _matrix()
    halves = {"q": G[:6, :6], "k": G[6:, 6:].diagonal()}
    parts = (_damped(halves["q"]), E[:6]), (_damped(halves["k"].diag()), E[6:])
    expected = sum(loss_increase(own, rows, _damped(C), 3) for own, rows in parts)
    assert Curvature(Inputs(C), halves, 3).loss(E) == pytest.approx(expected, rel=1e-4)


def test_without_rank_nothing_is_refitted() -> None:
    parts = Parts(*rank_zero_factors((OUT, IN), torch.zeros(1)), torch.tensor([1]), torch.ones(1))
    assert refitted(_matrix(), _curvature(), parts) is parts


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12, 20])
def test_exactly_as_many_as_asked_for_though_scores_tie(count: int) -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 0.0], [1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 1.0, 5.0]])
    mask = largest(scores, count)
    assert int(mask.sum()) == min(count, 12)
    if 0 < count < 12:
        assert float(scores[mask].min()) >= float(scores[~mask].max())
