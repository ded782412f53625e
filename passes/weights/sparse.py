"""Install the low rank and the sparse part of a matrix that a global search chose (2505.03801)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rk_export.matrix_id import MatrixId
from rk_export.passes.base import Layer
from rk_export.passes.modules.factors import JointFactors, JointMember
from rk_export.passes.modules.quantized import linear_of
from rk_export.passes.modules.sparse import SparseSum
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.weights.factorize import factors_path
from rk_export.plan import SitePlan
from rk_export.report.records import Finding, Outcome

# Entries are stored in half precision, as scales are: a search that drops whole entries does not resolve less.
VALUE_DTYPE = torch.float16
VALUE_BYTES = torch.finfo(VALUE_DTYPE).bits // 8
# A place is stored as the distance from the one before.
ENTRY_BYTES = VALUE_BYTES + 1


class Sparse:
    """Replace a matrix by the parts that were chosen for it.

    Args:
        parts: By layer and path of the matrix.
    """

    name = "sparse"

    def __init__(self, parts: Mapping[MatrixId, Parts]) -> None:
        self.parts = parts

    def applies(self, plan: SitePlan) -> bool:
        return plan.form == "sparse"

    @torch.no_grad()
    def rewrite(self, layer: Layer, plan: SitePlan, curvature: Curvature | None) -> Finding:
        (path,), (role,) = plan.paths, plan.members
        linear, parts = layer.linear(path), self.parts[plan.matrices[0]]
        values = parts.values.to(VALUE_DTYPE).to(linear.weight)
        indices = parts.indices.to(linear.weight.device)
        inside = None
        if parts.rank:
            up, down = parts.up.to(linear.weight), parts.down.to(linear.weight)
            factors = JointFactors(linear_of(down), {role: linear_of(up)})
            layer.replace(factors_path(plan), factors)
            inside = JointMember(factors, role)
        summed = SparseSum(inside, parts.shape, indices, values, linear.bias)
        layer.replace(path, summed)
        return _finding(plan, linear, parts, _relative_error(linear.weight, parts, summed))


def _relative_error(weight: Tensor, parts: Parts, summed: SparseSum) -> float:
    low_rank = parts.up.to(weight) @ parts.down.to(weight)
    norm = float(weight.norm())
    return float((weight - low_rank - summed.sparse).norm()) / norm if norm else 0.0


def _finding(plan: SitePlan, linear: nn.Linear, parts: Parts, error: float) -> Finding:
    size, count = linear.weight.element_size(), linear.weight.numel()
    return Finding(
        target=plan.site,
        outcome=Outcome.APPLIED,
        bytes_before=count * size,
        bytes_after=parts.rank * sum(parts.shape) * size + parts.entries * ENTRY_BYTES,
        error=error,
        details={
            "pass": Sparse.name,
            "form": plan.form,
            "rank": parts.rank,
            "entries": parts.entries,
            "density": parts.entries / count,
            "kept": parts.parameters / count,
        },
    )


def empty_sparse(layer: Layer, plan: SitePlan) -> None:
    """Put a sum of the planned shapes on the meta device in, for loading a saved model."""
    (path,), (role,) = plan.paths, plan.members
    linear = layer.linear(path)
    rows, columns = linear.out_features, linear.in_features
    inside = None
    if plan.rank:
        down = nn.Linear(columns, plan.rank, bias=False, device="meta")
        factors = JointFactors(down, {role: nn.Linear(plan.rank, rows, bias=False, device="meta")})
        layer.replace(factors_path(plan), factors)
        inside = JointMember(factors, role)
    layer.replace(path, SparseSum.empty(inside, (rows, columns), plan.entries, bias=linear.bias is not None))
