"""Rank rules share out one budget: its size, its limits, and who gets what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rk_export.passes.numerics.adaptive_ranks import (
    DENSE,
    RANK_SHARES,
    RankShare,
    RankSite,
    adaptive_ranks,
    spectral_size,
)
from rk_export.passes.numerics.ranks import rank_of_ratio

SHAPES = ((96, 128), (96, 400), (64, 64))


def site(decay: float, in_features: int = 96, out_features: int = 128) -> RankSite:
    """Return a site whose singular values fall by a factor from one to the next."""
    full = min(in_features, out_features)
    return RankSite(decay ** torch.arange(full, dtype=torch.float64), in_features, out_features)


def price(sites: list[RankSite], ranks: tuple[int, ...], *, identity: bool = False) -> int:
    return sum(item.cost(rank, identity=identity) for item, rank in zip(sites, ranks, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    decays=st.lists(st.floats(0.5, 0.999), min_size=1, max_size=6),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=6, max_size=6),
    keep=st.floats(0.2, 1.0),
    rule=st.sampled_from(RANK_SHARES),
    identity=st.booleans(),
)
def test_budget_is_spent_and_never_exceeded(
    decays: list[float], shapes: list[tuple[int, int]], keep: float, rule: RankShare, identity: bool
) -> None:
    sites = [site(decay, *shape) for decay, shape in zip(decays, shapes, strict=False)]
    ranks = adaptive_ranks(sites, keep, rule, identity=identity)
    total = sum(item.parameters for item in sites)
    spent = price(sites, ranks, identity=identity)
    assert spent <= keep * total
    for item, rank in zip(sites, ranks, strict=True):
        assert rank == item.form(rank, identity=identity) or rank == DENSE
    steps = [
        item.cost(item.form(rank + 1, identity=identity), identity=identity)
        - item.cost(rank, identity=identity)
        for item, rank in zip(sites, ranks, strict=True)
        if rank != DENSE
    ]
    assert not steps or keep * total - spent < max(steps) + 1


def test_uniform_keeps_the_same_share_of_every_matrix() -> None:
    sites = [site(decay, *shape) for decay, shape in zip((0.5, 0.9, 0.99), SHAPES, strict=True)]
    for keep in (0.3, 0.6, 0.9):
        expected = [rank_of_ratio(keep, item.in_features, item.out_features) for item in sites]
        ranks = adaptive_ranks(sites, keep, "uniform")
        assert all(0 <= rank - least <= 1 for rank, least in zip(ranks, expected, strict=True))


@pytest.mark.parametrize("rule", ["energy", "effective-rank", "stable-rank"])
def test_flat_spectra_get_more(rule: RankShare) -> None:
    flat, steep = site(0.99), site(0.8)
    assert spectral_size(flat, rule) > spectral_size(steep, rule)
    more, less = adaptive_ranks([flat, steep], 0.4, rule)
    assert more > 1.5 * less
    assert adaptive_ranks([steep, flat], 0.4, rule) == (less, more)


def test_gavish_donoho_counts_what_stands_out_of_the_noise() -> None:
    noise = torch.linspace(1.2, 0.8, 90, dtype=torch.float64)
    spiked = RankSite(torch.cat([torch.full((6,), 9.0, dtype=torch.float64), noise]), 96, 128)
    assert spectral_size(spiked, "gavish-donoho") == 6
    assert spectral_size(site(1.0), "gavish-donoho") == 1  # flat is all noise to it
    ranks = adaptive_ranks([spiked, site(1.0)], 0.25, "gavish-donoho")
    assert ranks[0] > 3 * ranks[1]


def test_ranks_are_in_proportion_to_the_sizes() -> None:
    sites = [site(0.97), site(0.9)]
    sizes = [spectral_size(item, "effective-rank") for item in sites]
    ranks = adaptive_ranks(sites, 0.3, "effective-rank")
    assert ranks[0] / ranks[1] == pytest.approx(sizes[0] / sizes[1], rel=0.15)


def test_what_would_cost_as_much_as_the_matrix_stays_dense() -> None:
    flat, steep = site(1.0), site(0.2)
    ranks = adaptive_ranks([flat, steep], 0.7, "effective-rank")
    assert ranks[0] == DENSE
    assert 0 < ranks[1] < 96 * 128 / (96 + 128)
    assert adaptive_ranks([flat, steep], 1.0, "effective-rank") == (DENSE, DENSE)


def test_identity_form_buys_more_rank_and_ends_at_the_smaller_side() -> None:
    sites = [site(0.9), site(0.9)]
    plain = adaptive_ranks(sites, 0.8, "uniform")
    identity = adaptive_ranks(sites, 0.8, "uniform", identity=True)
    assert all(more > less for more, less in zip(identity, plain, strict=True))
    assert identity[1] == rank_of_ratio(0.8, 96, 128, identity=True)
    assert sites[0].form(95, identity=True) == 95
    assert sites[0].form(96, identity=True) == DENSE
    assert sites[0].form(97, identity=True) == DENSE


def test_impossible_budgets_are_refused() -> None:
    for sites, keep in (([], 0.5), ([site(0.9)], 0.0), ([site(0.9)], 1.1), ([site(0.9)], 0.01)):
        with pytest.raises(ValueError, match=r"share|suffice"):
            adaptive_ranks(sites, keep, "uniform")
    with pytest.raises(ValueError, match="unknown rule"):
        spectral_size(site(0.9), "largest")  # type: ignore[arg-type]
