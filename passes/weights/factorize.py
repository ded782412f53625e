"""Joint rank-k approximation of matrices that read the same input (2402.16319), under a metric where one is given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rk_export.options.ranks import Gauge
from rk_export.passes.base import Layer
from rk_export.passes.modules.factors import GroupedFactors, JointFactors, JointMember, SharedFactors
from rk_export.passes.modules.quantized import linear_of as linear_of
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.joint_svd import Factors, factors_under, orthogonality_defect
from rk_export.passes.numerics.ranks import kept_ratio, spectrum
from rk_export.passes.numerics.threads import total
from rk_export.passes.weights.identity import empty_identity, identity_factors
from rk_export.passes.weights.neuron_order import obstacle, renumber, renumbered
from rk_export.plan import SitePlan
from rk_export.report.records import Finding, Outcome, Spectrum


class Factorize:
    """Replace the members of a site by factor pairs of the planned rank.

    Curvatures must have been gathered before the pass touched the layer: the identity form of gate and up
    renumbers the layer's neurons, and curvatures of its later sites are renumbered here. A later pass that reads
    the same curvatures takes them through `aligned`.

    Args:
        gauge: Which factor carries the singular values.
        device: Where the factorization runs.
        mlp: The path of each FFN matrix by role, as the family has them; without it neurons keep their numbers
            and the identity form of gate and up needs a Gather.

    `spectra` collects the spectrum of every factorized matrix on the way, whitened under a metric.
    """

    name = "factorize"

    def __init__(self, gauge: Gauge, device: torch.device, mlp: Mapping[str, str] | None = None) -> None:
        self.gauge = gauge
        self.device = device
        self.mlp = mlp or {}
        self.spectra: list[Spectrum] = []
        self._neuron_orders: dict[int, Tensor] = {}

    def applies(self, plan: SitePlan) -> bool:
        return plan.form not in ("dense", "sparse")

    def aligned(self, plan: SitePlan, curvature: Curvature | None) -> Curvature | None:
        """Return a site's curvature in the order in which the layer's neurons are now."""
        order = self._neuron_orders.get(plan.layer)
        if curvature is None or order is None:
            return curvature
        return renumbered(curvature, plan, order)

    @torch.no_grad()
    def rewrite(self, layer: Layer, plan: SitePlan, curvature: Curvature | None) -> Finding:
        members = [layer.linear(path) for path in plan.paths]
        pairs = list(stacked_pairs(layer, plan))
        rows = {role: linear.out_features for role, linear in pairs[0][1].items()}
        known = self.aligned(plan, curvature)
        known = None if known is None else known.to(self.device)
        parts = [
            self._factorize(linears, plan.rank, None if known is None else known.of_rows(rows, group))
            for group, (_, linears) in enumerate(pairs)
        ]
        for (target, _), factors in zip(pairs, parts, strict=True):
            self.spectra.append(spectrum(target, factors.singular_values.cpu(), plan.rank))
        details = self._error_details(parts, known)
        if plan.form == "identity":
            details |= self._install_identity(layer, plan, parts[0])
        else:
            modules = [_pair(factors, linears) for factors, (_, linears) in zip(parts, pairs, strict=True)]
            install(layer, plan, modules[0] if plan.form == "joint" else GroupedFactors(modules))
        return self._finding(plan, members, parts, details)

    def _factorize(self, rows: dict[str, nn.Linear], rank: int, curvature: Curvature | None) -> Factors:
        stacked = torch.cat([linear.weight.to(self.device) for linear in rows.values()])
        return factors_under(stacked, rank, curvature, gauge=self.gauge)

    def _install_identity(self, layer: Layer, plan: SitePlan, factors: Factors) -> dict[str, object]:
        """Put the identity form in, neurons renumbered where that saves a Gather; return its details."""
        reason = obstacle(layer, plan, self.mlp)
        if not reason and len(plan.members) == 2 and plan.rank % 2:
            reason = f"rank {plan.rank} is odd"
        built = identity_factors(layer, plan, factors, as_neurons=not reason)
        if built.neurons is not None:
            renumber(layer, plan, self.mlp, built.neurons)
            self._neuron_orders[layer.index] = built.neurons
        install(layer, plan, built.factors)
        return {
            "condition": built.form.condition,
            "max_coefficient": built.form.max_coefficient,
            "gather": reason or None,
        }

    def _error_details(self, parts: list[Factors], curvature: Curvature | None) -> dict[str, object]:
        metric = None if curvature is None else curvature.inputs.metric
        defects = [orthogonality_defect(factors.down, metric) for factors in parts]
        return {
            "metric": "none" if curvature is None else curvature.weighed,
            "weighted_error": max(factors.weighted_error for factors in parts),
            "gauge": self.gauge,
            "orthogonality_defect": max(defects) if self.gauge == "orthogonal" else None,
        }

    def _finding(
        self, plan: SitePlan, members: list[nn.Linear], parts: list[Factors], details: dict[str, object]
    ) -> Finding:
        weights = [linear.weight for linear in members]
        groups, identity = len(parts), plan.form == "identity"
        columns, rows = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        norm = math.sqrt(sum(float(total(weight.double().square())) for weight in weights))
        squared_error = sum(factors.squared_error for factors in parts)
        kept = kept_ratio(plan.rank, columns, rows // groups, identity=identity)
        size = weights[0].element_size()
        return Finding(
            target=plan.site,
            outcome=Outcome.APPLIED,
            bytes_before=rows * columns * size,
            bytes_after=round(kept * rows * columns) * size,
            error=math.sqrt(squared_error) / norm if norm else 0.0,
            details={
                "pass": self.name,
                "form": plan.form,
                "rank": plan.rank,
                "pairs": groups,
                "kept": kept,
                **details,
            },
        )


def _pair(factors: Factors, rows: dict[str, nn.Linear]) -> JointFactors:
    home = next(iter(rows.values())).weight.device
    ups = torch.split(factors.up.to(home), [linear.out_features for linear in rows.values()])
    return JointFactors(
        linear_of(factors.down.to(home)),
        # Own copies: views of one storage could not be saved apart.
        {
            role: linear_of(up.clone(), None if linear.bias is None else linear.bias.clone())
            for (role, linear), up in zip(rows.items(), ups, strict=True)
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


def factors_path(plan: SitePlan) -> str:
    """Return the name, within the layer, under which a site's factors are registered."""
    return plan.site.rpartition(".")[2] + "_factors"


def install(layer: Layer, plan: SitePlan, factors: SharedFactors) -> None:
    """Register the factors in the layer and let every member read its share of them."""
    layer.replace(factors_path(plan), factors)
    for role, path in zip(plan.members, plan.paths, strict=True):
        layer.replace(path, JointMember(factors, role))


def empty_factors(layer: Layer, plan: SitePlan) -> SharedFactors:
    """Return factors of the planned shapes on the meta device, for loading a saved model."""
    members = {role: layer.linear(path) for role, path in zip(plan.members, plan.paths, strict=True)}
    if plan.form == "identity":
        return empty_identity(members, plan.rank)
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
