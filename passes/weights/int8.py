"""Int8 with int8 inputs (W8A8) for dense matrices and for both factors of a pair."""

from __future__ import annotations

import torch
from torch import nn

from rk_export.options.quantization import W8A8
from rk_export.passes.base import Layer
from rk_export.passes.modules.quantized import Int8Linear
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.int8 import int8_bytes, quantize_rows
from rk_export.passes.numerics.threads import total
from rk_export.passes.weights.quantize import matrix_paths
from rk_export.plan import SitePlan
from rk_export.report.records import Finding, Outcome


class Int8:
    """Round every matrix of a site to int8, one scale a row; its inputs are rounded when they arrive.

    Args:
        device: Where the rounding runs.
    """

    name = "int8"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def applies(self, plan: SitePlan) -> bool:
        return plan.quant == W8A8

    @torch.no_grad()
    def rewrite(self, layer: Layer, plan: SitePlan, curvature: Curvature | None) -> Finding:
        squared_error = squared_norm = 0.0
        before = after = 0
        for path in matrix_paths(layer, plan):
            linear = layer.linear(path)
            quantized = self.quantize(linear)
            squared_error += float(total((quantized.weight - linear.weight).double().square()))
            squared_norm += float(total(linear.weight.double().square()))
            before += linear.weight.numel() * linear.weight.element_size()
            after += int8_bytes(linear.out_features, linear.in_features)
            layer.replace(path, quantized)
        return Finding(
            target=plan.site,
            outcome=Outcome.APPLIED,
            bytes_before=before,
            bytes_after=after,
            error=(squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
            details={"pass": self.name, **W8A8.details()},
        )

    def quantize(self, linear: nn.Linear) -> Int8Linear:
        """Return the int8 counterpart of a linear module, on the module's device."""
        home = linear.weight.device
        return Int8Linear(quantize_rows(linear.weight.to(self.device)), linear.bias).to(home)
