"""Matrices that a checkpoint stores quantized, carried over into MatMulNBits' layout: equal codes, equal values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rk_export.errors import InputError
from rk_export.passes.base import Layer
from rk_export.passes.modules.quantized import QuantizedLinear
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.grid import Grid, as_blocks, why_not_carried
from rk_export.plan import SitePlan
from rk_export.report.records import Finding, Outcome

# Returns the codes of a matrix of a layer as the checkpoint stores them, or None where they are not on a grid.
Grids = Callable[[Layer, str], Grid | None]


class Carry:
    """Put the checkpoint's own codes in the place of dense matrices.

    Args:
        grids: Where the codes come from.
        float_dtype: Float type of the graph, `fp32` or `fp16`.
    """

    name = "carry"

    def __init__(self, grids: Grids, float_dtype: str) -> None:
        self._grids, self._float_dtype = grids, float_dtype

    def applies(self, plan: SitePlan) -> bool:
        return plan.carried

    @torch.no_grad()
    def rewrite(self, layer: Layer, plan: SitePlan, curvature: Curvature | None) -> Finding:
        """Replace the matrices of one site.

        Raises:
            InputError: If the source does not hold them on the planned grid.
        """
        before = after = 0
        for path in plan.paths:
            linear = layer.linear(path)
            grid = self._grids(layer, path)
            reason = why_not(grid, linear, self._float_dtype)
            matrix = None if reason or grid is None else as_blocks(grid)
            if matrix is None or matrix.spec != plan.quant:
                raise InputError(
                    f"the codes of {path} cannot be carried over: "
                    f"{reason or 'they have other bits or blocks than the plan says'}",
                    where=plan.site,
                    fix="make the plan anew for this model, or set carried to false",
                )
            module = QuantizedLinear(matrix, linear.bias).to(linear.weight.device)
            layer.replace(path, module)
            before += linear.weight.numel() * linear.weight.element_size()
            after += sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
        details: dict[str, Any] = {"pass": self.name, **(plan.quant.details() if plan.quant else {})}
        return Finding(plan.site, Outcome.APPLIED, "", before, after, 0.0, details)


def why_not(grid: Grid | None, linear: nn.Linear, float_dtype: str) -> str:
    """Return why a matrix cannot be carried over, or an empty string.

    Args:
        grid: Its codes in the checkpoint; None where they are not on an integer grid.
        linear: The module with the values that the model computes with.
        float_dtype: Float type of the graph, `fp32` or `fp16`.
    """
    if grid is None:
        return "the checkpoint does not store it on an integer grid"
    if reason := why_not_carried(grid, float_dtype):
        return reason
    if not torch.equal(grid.dequantize(), linear.weight.detach().cpu().to(torch.float32)):
        return "its values were changed after they were dequantized"
    return ""
