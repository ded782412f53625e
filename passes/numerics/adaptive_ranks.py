"""Ranks from the spectra alone: how one budget of parameters is shared out among matrices.

2402.16319 keeps the same share of every matrix. The other rules read each spectrum: a matrix gets a rank in proportion
to a size that the rule sees in its singular values, and one factor, common to all matrices, is found by bisection so
that every rule keeps the same number of parameters. A rule decides how a budget is shared, never how large it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rk_export.options.ranks import ALLOCATIONS, Allocation
from rk_export.passes.numerics.ranks import (
    effective_rank,
    gavish_donoho_rank,
    rank_of_energy,
    stable_rank,
)

RankShare = Allocation
RANK_SHARES = ALLOCATIONS
DENSE = 0
ENERGY = 0.9
_HALVINGS = 60


@dataclass(frozen=True)
class RankSite:
    """A matrix (out, in), or matrices stacked on the output axis, that may become a factor pair.

    Args:
        singular_values: All of them, descending; under a metric those of what is decomposed.
        in_features: in.
        out_features: out, of all stacked matrices.
    """

    singular_values: Tensor
    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Parameters of the dense matrix."""
        return self.in_features * self.out_features

    def cost(self, rank: int, *, identity: bool = False) -> int:
        """Return the parameters of a factor pair, or those of the dense matrix for rank `DENSE`."""
        if rank == DENSE:
            return self.parameters
        return rank * (self.in_features + self.out_features - (rank if identity else 0))

    def form(self, rank: int, *, identity: bool = False) -> int:
        """Return the rank, at least 1, or `DENSE` where the pair would be no smaller than the matrix.

        Beyond rank min(in, out) the identity form has no meaning, and its price would fall again.
        """
        rank = max(rank, 1)
        too_large = rank >= min(self.in_features, self.out_features)
        return DENSE if too_large or self.cost(rank, identity=identity) >= self.parameters else rank


def adaptive_ranks(
    sites: Sequence[RankSite], keep: float, rule: RankShare, *, energy: float = ENERGY, identity: bool = False
) -> tuple[int, ...]:
    """Return the rank of every site, `DENSE` where it stays a dense matrix.

    All sites together hold at most `keep` of the dense parameters, and less than that by no more than the price of one
    rank of one site, unless every site is dense already.

    Args:
        sites: At least one.
        keep: Share of the parameters of all sites, above 0 and at most 1.
        rule: What a site's rank is in proportion to: `uniform` the rank at which its pair is as large as the matrix,
            `energy` the rank that keeps `energy` of its squared singular values, `gavish-donoho` the number of values
            above 2.858 times their median (1305.5870), `effective-rank` the exponential of the entropy of its values,
            `stable-rank` its squared Frobenius norm over its squared spectral norm.
        energy: Of the rule `energy`.
        identity: Count parameters of the identity form, k (in + out - k).

    Raises:
        ValueError: If `keep` is out of range, no site is given, or rank 1 everywhere is above the budget.
    """
    if not sites or not 0 < keep <= 1:
        raise ValueError(f"{len(sites)} sites cannot share {keep} of their parameters")
    sizes = [spectral_size(site, rule, energy=energy) for site in sites]
    budget = math.floor(keep * sum(site.parameters for site in sites))

    def scaled(factor: float) -> list[int]:
        pairs = zip(sites, sizes, strict=True)
        return [site.form(int(factor * size), identity=identity) for site, size in pairs]

    def affordable(factor: float) -> bool:
        return _price(sites, scaled(factor), identity) <= budget

    if not affordable(0.0):
        raise ValueError(f"{keep} of the parameters do not suffice for rank 1 everywhere")
    full = (min(site.in_features, site.out_features) / size for site, size in zip(sites, sizes, strict=True))
    low, high = 0.0, max(full)
    if affordable(high):
        return tuple(scaled(high))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    # What rounding left over goes to those that lost most by it.
    order = sorted(range(len(sites)), key=lambda index: -((low * sizes[index]) % 1))
    return tuple(_spent(sites, scaled(low), order, budget, identity))


def _price(sites: Sequence[RankSite], ranks: Sequence[int], identity: bool) -> int:
    return sum(site.cost(rank, identity=identity) for site, rank in zip(sites, ranks, strict=True))


def _spent(
    sites: Sequence[RankSite], ranks: list[int], order: Sequence[int], budget: int, identity: bool
) -> list[int]:
    """Return the ranks with one more for each site, in an order, that can still be paid."""
    left = budget - _price(sites, ranks, identity)
    for index in order:
        site, rank = sites[index], ranks[index]
        if rank == DENSE:
            continue
        more = site.form(rank + 1, identity=identity)
        extra = site.cost(more, identity=identity) - site.cost(rank, identity=identity)
        if extra <= left:
            ranks[index], left = more, left - extra
    return ranks


def spectral_size(site: RankSite, rule: RankShare, *, energy: float = ENERGY) -> float:
    """Return what a site's rank is in proportion to, see `adaptive_ranks`; at least 1.

    Raises:
        ValueError: If the rule is unknown.
    """
    values = site.singular_values
    match rule:
        case "uniform":
            size = site.parameters / (site.in_features + site.out_features)
        case "energy":
            size = rank_of_energy(values, energy)
        case "gavish-donoho":
            size = gavish_donoho_rank(values)
        case "effective-rank":
            size = effective_rank(values)
        case "stable-rank":
            size = stable_rank(values)
        case _:
            raise ValueError(f"unknown rule {rule!r}")
    return max(float(size), 1.0)
