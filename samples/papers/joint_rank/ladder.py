"""All truncations of a model's matrix groups at the price of one factorization each (2402.16319).

The rank-k factors are the first k rows and columns of the full-rank factors, whatever the metric. A ladder factorizes
every group once, and then puts the product of any rank in the place of the dense matrices: a model to be evaluated,
which computes what factor pairs of that rank compute. Nothing gets smaller by it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export import Recipe
from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.layer_statistics import BySite, FromDense, LayerStatistics, NoStatistics
from rk_export.model.architecture import Architecture
from rk_export.model.families.registry import heads_of
from rk_export.model.sites import dense_sites
from rk_export.passes.base import Layer
from rk_export.passes.numerics.adaptive_ranks import DENSE, RankSite
from rk_export.passes.numerics.joint_svd import Factors, factors_under
from rk_export.passes.numerics.ranks import rank_of_ratio
from rk_export.passes.weights.factorize import stacked_pairs
from rk_export.plan import SitePlan

logger = logging.getLogger(__name__)

# Groups of matrices by name, and the roles of their members.
GROUPS = {"qk": ("q", "k"), "gate_up": ("gate", "up"), **{role: (role,) for role in ("q", "k", "gate", "up")}}


@dataclass(frozen=True)
class LadderPair:
    """One group of matrices and its full-rank factors.

    Args:
        target: Name of the group, such as ``layers.3.qk``.
        linears: Its matrices, views of the model's own.
        dense: The stacked weights as they were (out, in).
        factors: Of full rank, directions ordered by falling singular value.
    """

    target: str
    linears: tuple[nn.Linear, ...]
    dense: Tensor
    factors: Factors

    @property
    def site(self) -> RankSite:
        """Shape and spectrum, for rank rules."""
        return RankSite(self.factors.singular_values, self.dense.shape[1], self.dense.shape[0])

    def product(self, rank: int) -> Tensor:
        """Return the best approximation of a rank, (out, in); the matrix itself for `DENSE`."""
        if rank == DENSE:
            return self.dense
        return self.factors.up[:, :rank] @ self.factors.down[:rank]

    @torch.no_grad()
    def put(self, stacked: Tensor) -> None:
        """Write stacked weights (out, in) into the model."""
        parts = torch.split(stacked, [linear.out_features for linear in self.linears])
        for linear, part in zip(self.linears, parts, strict=True):
            linear.weight.copy_(part)


class RankLadder:
    """Truncations of some matrix groups of a model, in place.

    Args:
        pairs: What is truncated.
    """

    def __init__(self, pairs: Sequence[LadderPair]) -> None:
        self.pairs = tuple(pairs)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: PreTrainedModel,
        architecture: Architecture,
        groups: tuple[str, ...],
        *,
        per_head: bool = False,
        statistics: DenseStatistics | None = None,
    ) -> RankLadder:
        """Factorize groups of every layer of a dense model in canonical form.

        Args:
            model: The model; it is not changed, but shares its weights with the ladder.
            architecture: Its family.
            groups: Names of `GROUPS`.
            per_head: Cut every matrix of the groups by KV groups, each a pair of its own.
            statistics: The metric; None weighs all alike.
        """
        known: LayerStatistics = NoStatistics() if statistics is None else FromDense(statistics)
        layers = list(model.get_submodule(architecture.layers).children())
        kv_groups = heads_of(model.config).kv_heads
        members = {GROUPS[group] for group in groups}
        pairs: list[LadderPair] = []
        for index, module in enumerate(layers):
            logger.info("factorizing layer %d of %d", index + 1, len(layers))
            layer = Layer(index, module, kv_groups)
            projections = architecture.projections(model.config, index)
            form: Literal["joint", "per_head"] = "per_head" if per_head else "joint"
            sites = [
                replace(site, form=form, rank=1)
                for site in dense_sites(layer, projections, Recipe(), groups)
                if site.members in members
            ]
            pairs += _pairs_of(layer, sites, known.of_sites(layer, sites))
        return cls(pairs)

    @property
    def sites(self) -> list[RankSite]:
        """Shapes and spectra of the pairs, for rank rules."""
        return [pair.site for pair in self.pairs]

    def ranks_of_ratio(self, keep: float) -> list[int]:
        """Return for each pair the largest rank that holds at most `keep` of its dense parameters."""
        return [rank_of_ratio(keep, site.in_features, site.out_features) for site in self.sites]

    def ranks_of_share(self, share: float) -> list[int]:
        """Return for each pair a share, above 0 and at most 1, of its full rank; at least 1."""
        return [max(1, round(share * min(pair.dense.shape))) for pair in self.pairs]

    def kept(self, ranks: Sequence[int]) -> float:
        """Return the share of the parameters that pairs of these ranks hold; above 1 beyond break-even."""
        costs = [site.cost(rank) for site, rank in zip(self.sites, ranks, strict=True)]
        return sum(costs) / sum(site.parameters for site in self.sites)

    def relative_error(self, ranks: Sequence[int]) -> float:
        """Return the Frobenius norm of all errors over that of all matrices."""
        lost = total = 0.0
        for pair, rank in zip(self.pairs, ranks, strict=True):
            lost += float((pair.product(rank) - pair.dense).double().square().sum())
            total += float(pair.dense.double().square().sum())
        return float((lost / total) ** 0.5)

    def weighted_error(self, ranks: Sequence[int]) -> float:
        """Return the relative error that was minimized, of all pairs together: of the whitened matrices."""
        lost = total = 0.0
        for pair, rank in zip(self.pairs, ranks, strict=True):
            energy = pair.factors.singular_values.square()
            lost += 0.0 if rank == DENSE else float(energy[rank:].sum())
            total += float(energy.sum())
        return float((lost / total) ** 0.5)

    @contextmanager
    def cut(self, ranks: Sequence[int]) -> Iterator[None]:
        """Truncate the model inside this context; its weights are put back, bit by bit, afterwards."""
        try:
            for pair, rank in zip(self.pairs, ranks, strict=True):
                pair.put(pair.product(rank))
            yield
        finally:
            for pair in self.pairs:
                pair.put(pair.dense)


def _pairs_of(layer: Layer, sites: Iterable[SitePlan], known: BySite) -> Iterator[LadderPair]:
    for site in sites:
        parts = list(stacked_pairs(layer, site))
        rows = {role: linear.out_features for role, linear in parts[0][1].items()}
        device = parts[0][1][site.members[0]].weight.device
        curvature = known.get(site.site)
        curvature = None if curvature is None else curvature.to(device)
        for group, (target, linears) in enumerate(parts):
            dense = torch.cat([linear.weight for linear in linears.values()])
            own = None if curvature is None else curvature.of_rows(rows, group)
            factors = factors_under(dense, min(dense.shape), own)
            yield LadderPair(target, tuple(linears.values()), dense, factors)
