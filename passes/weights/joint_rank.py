"""Joint rank-k approximation of matrices that read the same input (2402.16319)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rk_export.options import Gauge
from rk_export.passes.base import Layer, SiteStatistics
from rk_export.passes.modules import GroupedFactors, JointFactors, JointMember
from rk_export.passes.numerics.joint_svd import Factors, joint_factors, orthogonality_defect
from rk_export.passes.numerics.ranks import kept_ratio, spectrum
from rk_export.plan import SitePlan
from rk_export.report import Finding, Outcome, Spectrum


class JointRank:
    """Replace the members of a site by factor pairs of the planned rank.

    Args:
        gauge: Which factor carries the singular values.
        device: Where the factorization runs.

    `spectra` collects the spectrum of every factorized matrix on the way.
    """

    name = "joint-rank"

    def __init__(self, gauge: Gauge, device: torch.device) -> None:
        self.gauge = gauge
        self.device = device
        self.spectra: list[Spectrum] = []

    def applies(self, plan: SitePlan) -> bool:
        return plan.form != "dense"

    @torch.no_grad()
    def rewrite(self, layer: Layer, plan: SitePlan, statistics: SiteStatistics | None) -> Finding:
        members = [layer.linear(path) for path in plan.paths]
        pairs, squared_error, defect = [], 0.0, 0.0
        for target, rows in stacked_pairs(layer, plan):
            pair, decomposed = self._factorize(rows, plan.rank)
            pairs.append(pair)
            squared_error += decomposed.squared_error
            self.spectra.append(spectrum(target, decomposed.singular_values.cpu(), plan.rank))
            defect = max(defect, orthogonality_defect(decomposed.down))
        install(layer, plan, pairs[0] if plan.form == "joint" else GroupedFactors(pairs))
        return self._finding(plan, members, len(pairs), squared_error, defect)

    def _factorize(self, rows: dict[str, nn.Linear], rank: int) -> tuple[JointFactors, Factors]:
        stacked = torch.cat([linear.weight.to(self.device) for linear in rows.values()])
        factors = joint_factors(stacked, rank, gauge=self.gauge)
        home = next(iter(rows.values())).weight.device
        ups = torch.split(factors.up.to(home), [linear.out_features for linear in rows.values()])
        return JointFactors(
            linear_of(factors.down.to(home)),
            # Own copies: views of one storage could not be saved apart.
            {
                role: linear_of(up.clone(), None if linear.bias is None else linear.bias.clone())
                for (role, linear), up in zip(rows.items(), ups, strict=True)
            },
        ), factors

    def _finding(
        self, plan: SitePlan, members: list[nn.Linear], groups: int, squared_error: float, defect: float
    ) -> Finding:
        weights = [linear.weight for linear in members]
        columns, rows = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        norm = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))
        size = weights[0].element_size()
        return Finding(
            target=plan.site,
            outcome=Outcome.APPLIED,
            bytes_before=rows * columns * size,
            bytes_after=plan.rank * (groups * columns + rows) * size,
            error=math.sqrt(squared_error) / norm if norm else 0.0,
            details={
                "pass": self.name,
                "form": plan.form,
                "rank": plan.rank,
                "pairs": groups,
                "kept": kept_ratio(plan.rank, columns, rows // groups),
                "gauge": self.gauge,
                "orthogonality_defect": defect if self.gauge == "orthogonal" else None,
            },
        )


def stacked_pairs(layer: Layer, plan: SitePlan) -> Iterator[tuple[str, dict[str, nn.Linear]]]:
    """Yield name and members of each factor pair of a site: one per KV group when per head, else one."""
    members = {role: layer.linear(path) for role, path in zip(plan.members, plan.paths, strict=True)}
    per_head = plan.form == "per_head"
    groups = layer.kv_groups if per_head else 1
    for group in range(groups):
        rows = {role: _rows(linear, group, groups) for role, linear in members.items()}
        yield f"{plan.site}.{group}" if per_head else plan.site, rows


def _rows(linear: nn.Linear, group: int, groups: int) -> nn.Linear:
    """Return the rows of one KV group: its query heads, or its key head, as a linear module (a view)."""
    size = linear.out_features // groups
    rows = slice(group * size, (group + 1) * size)
    return linear_of(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear module over existing tensors: weight (out, in), bias (out,) or None."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def factors_path(plan: SitePlan) -> str:
    """Return the name, within the layer, under which a site's factors are registered."""
    return plan.site.rpartition(".")[2] + "_factors"


def install(layer: Layer, plan: SitePlan, factors: JointFactors | GroupedFactors) -> None:
    """Register the factors in the layer and let every member read its share of them."""
    layer.replace(factors_path(plan), factors)
    for role, path in zip(plan.members, plan.paths, strict=True):
        layer.replace(path, JointMember(factors, role))


def empty_factors(layer: Layer, plan: SitePlan) -> JointFactors | GroupedFactors:
    """Return factors of the planned shapes on the meta device, for loading a saved model."""
    members = {role: layer.linear(path) for role, path in zip(plan.members, plan.paths, strict=True)}
    columns = next(iter(members.values())).in_features
    groups = layer.kv_groups if plan.form == "per_head" else 1
    pairs = [
        JointFactors(
            nn.Linear(columns, plan.rank, bias=False, device="meta"),
            {
                role: nn.Linear(
                    plan.rank, linear.out_features // groups, linear.bias is not None, device="meta"
                )
                for role, linear in members.items()
            },
        )
        for _ in range(groups)
    ]
    return pairs[0] if plan.form == "joint" else GroupedFactors(pairs)
