"""Weight-only quantization of dense matrices and of both factors of a pair."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rk_export.options import QuantSpec
from rk_export.passes.base import Layer, SiteStatistics
from rk_export.passes.modules import JointMember, QuantizedLinear
from rk_export.passes.numerics.quantize import quantize_rtn, quantized_bytes
from rk_export.passes.weights.joint_rank import factors_path
from rk_export.plan import SitePlan
from rk_export.report import Finding, Outcome


class Quantize:
    """Round every matrix of a site to the planned bits.

    Args:
        scale_dtype: Float type of the scales, the float type of the exported graph.
        device: Where the rounding runs.
    """

    name = "quantize"

    def __init__(self, scale_dtype: torch.dtype, device: torch.device) -> None:
        self.scale_dtype = scale_dtype
        self.device = device

    def applies(self, plan: SitePlan) -> bool:
        return plan.quant is not None

    @torch.no_grad()
    def rewrite(self, layer: Layer, plan: SitePlan, statistics: SiteStatistics | None) -> Finding:
        if plan.quant is None:
            raise ValueError(f"{plan.site} has no quantization planned")
        squared_error = squared_norm = 0.0
        before = after = 0
        for path in matrix_paths(layer, plan):
            linear = layer.linear(path)
            quantized = self.quantize(linear, plan.quant)
            difference = quantized.weight.double() - linear.weight.double()
            squared_error += float(difference.square().sum())
            squared_norm += float(linear.weight.double().square().sum())
            before += linear.weight.numel() * linear.weight.element_size()
            after += quantized_bytes(
                linear.out_features, linear.in_features, plan.quant, quantized.scales.element_size()
            )
            layer.replace(path, quantized)
        return Finding(
            target=plan.site,
            outcome=Outcome.APPLIED,
            bytes_before=before,
            bytes_after=after,
            error=(squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
            details={"pass": self.name, "bits": plan.quant.bits, "block": plan.quant.block_size},
        )

    def quantize(self, linear: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Return the quantized counterpart of a linear module, on the module's device."""
        home = linear.weight.device
        matrix = quantize_rtn(linear.weight.to(self.device), spec, scale_dtype=self.scale_dtype)
        return QuantizedLinear(matrix, linear.bias).to(home)


def matrix_paths(layer: Layer, plan: SitePlan) -> Iterator[str]:
    """Yield the path of every matrix that stands for a site: the members, or the factors they share."""
    if not isinstance(layer.module.get_submodule(plan.paths[0]), JointMember):
        yield from plan.paths
        return
    root = factors_path(plan)
    for name, module in layer.module.get_submodule(root).named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            yield f"{root}.{name}"
