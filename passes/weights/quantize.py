"""Weight-only quantization of dense matrices and of both factors of a pair.

Searched scales and GPTQ first put a pair into the gauge that suits them. The second factor is then refitted to the
quantized first one: with A_q for A, the B that minimizes |(B₀ A - B A_q) C^½| is B₀ M, M = A C A_qᵀ (A_q C A_qᵀ)^-1,
and what it reads has the second moment A_q C A_qᵀ. The coefficients of the identity form are refitted alike, its pivot
block being the first factor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rk_export.options.quantization import QuantSpec
from rk_export.passes.base import Layer
from rk_export.passes.modules.factors import IdentityFactors, JointFactors, JointMember
from rk_export.passes.modules.quantized import Int8Linear, QuantizedLinear
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.gauge import balanced_gauge, mixed_gauge
from rk_export.passes.numerics.identity_form import refit_up
from rk_export.passes.weights.correction import corrected_linear
from rk_export.passes.weights.factorize import factors_path
from rk_export.passes.weights.quantization_tally import QuantizationTally
from rk_export.passes.weights.quantizer import Quantizer, QuantizerName
from rk_export.plan import SitePlan
from rk_export.report.records import Finding, Outcome

logger = logging.getLogger(__name__)

NO_STATISTICS = (
    "gptq needs the second moment of the inputs, which was not taken: scales were searched instead"
)


class Quantize:
    """Round every matrix of a site to the planned bits.

    Args:
        scale_dtype: Float type of the stored scales.
        device: Where the rounding runs.
        quantizer: `rtn` rounds to nearest, `search` also searches the scales, `gptq` also makes up for each
            column's error; the last two weigh by the curvature and refit the second factor of a pair.
        singly: By the name of the matrix, what is known of matrices that share a site and not what they read: experts.
    """

    name = "quantize"

    def __init__(
        self,
        scale_dtype: torch.dtype,
        device: torch.device,
        quantizer: QuantizerName = "rtn",
        singly: Mapping[str, Curvature] | None = None,
    ) -> None:
        self._singly = singly or {}
        self.scale_dtype = scale_dtype
        self.device = device
        self.quantizer = Quantizer(quantizer, scale_dtype)

    def applies(self, plan: SitePlan) -> bool:
        return plan.quant is not None and plan.quant.activations == 16 and not plan.carried

    @torch.no_grad()
    def rewrite(self, layer: Layer, plan: SitePlan, curvature: Curvature | None) -> Finding:
        if plan.quant is None:
            raise ValueError(f"{plan.site} has no quantization planned")
        inputs = None if curvature is None else curvature.inputs.to(self.device)
        work = _Work(self.quantizer.on(inputs), plan.quant, inputs, self.device)
        first = layer.at(plan.paths[0])
        if isinstance(first, JointMember):
            for pair in first.factors.pairs():
                work.quantize_pair(pair)
        elif "expert" in plan.members:
            return self._experts(layer, plan, work)
        else:
            for path in plan.paths:
                layer.replace(path, work.quantize_dense(layer.linear(path), plan.correction))
        return self._finding(plan, work)

    def _experts(self, layer: Layer, plan: SitePlan, work: _Work) -> Finding:
        """Round the matrices of experts, each as what it read says, as far as that is known."""
        unknown = 0
        for path, place in zip(plan.paths, plan.matrices, strict=True):
            curvature = self._singly.get(place.name)
            inputs = None if curvature is None else curvature.inputs.to(self.device)
            unknown += inputs is None
            own = replace(work, quantizer=self.quantizer.on(inputs), inputs=inputs)
            layer.replace(path, own.quantize_dense(layer.linear(path), plan.correction))
        finding = self._finding(plan, replace(work, quantizer=self.quantizer))
        if self.quantizer.name == "rtn" or not unknown:
            return finding
        reason = f"{unknown} of {len(plan.paths)} matrices of experts read too few tokens: rounded by their weights"
        logger.info("%s: %s", plan.site, reason)
        return replace(finding, reason=reason)

    def _finding(self, plan: SitePlan, work: _Work) -> Finding:
        details: dict[str, Any] = {"pass": self.name, **work.spec.details(), "quantizer": work.quantizer.name}
        if work.inputs is not None or work.tally.is_weighted:
            details["weighted_error"] = work.tally.weighted_error
        if plan.correction:
            details["correction"] = plan.correction
        return Finding(
            target=plan.site,
            outcome=Outcome.APPLIED,
            reason="" if work.quantizer == self.quantizer else NO_STATISTICS,
            bytes_before=work.tally.before,
            bytes_after=work.tally.after,
            error=work.tally.error,
            details=details,
        )


@dataclass(frozen=True)
class _Work:
    """The quantization of one site.

    Args:
        quantizer: What is used.
        spec: Bits and blocks.
        inputs: What is known about the site's common input; None weighs all columns alike.
        device: Where the rounding runs.
        tally: Bytes and errors so far.
    """

    quantizer: Quantizer
    spec: QuantSpec
    inputs: Inputs | None
    device: torch.device
    tally: QuantizationTally = field(default_factory=QuantizationTally)

    def quantize_dense(self, linear: nn.Linear, correction: int) -> nn.Module:
        """Return what stands for a dense matrix, with a branch of a rank that corrects it unless that is 0."""
        target = self.moved(linear.weight)
        target = target if self.inputs is None else self.inputs.aimed(target)
        if not correction:
            module = self.module(linear, target, self.inputs)
            self.tally.count(linear, module)
            self.tally.compare(target, self.moved(module.weight), self.inputs)
            return module
        corrected = corrected_linear(linear, target, correction, self.spec, self.inputs, self.quantizer)
        self.tally.count(linear, corrected.quantized, corrected.down, corrected.up)
        self.tally.compare(target, self.moved(corrected.weight), self.inputs)
        return corrected

    def quantize_pair(self, pair: JointFactors | IdentityFactors) -> None:
        """Quantize the first factor of a pair in place, then what reads it."""
        first, seconds = _linear(pair.down), {role: _linear(up) for role, up in pair.ups.items()}
        A, Bs = self.moved(first.weight), [self.moved(linear.weight) for linear in seconds.values()]
        if isinstance(pair, JointFactors):
            A, Bs = self._in_gauge(A, Bs)
        down = self.module(first, A, self.inputs)
        A_q = self.moved(down.weight)
        pair.down = down
        self.tally.count(first, down)
        if isinstance(pair, IdentityFactors):
            self.tally.compare(A, A_q, self.inputs)  # the pivots are outputs themselves
        metric = None if self.inputs is None else self.inputs.metric
        refit = None if self.quantizer.name == "rtn" else refit_up(A, A_q, metric)
        behind = None if self.inputs is None else self.inputs.behind(A_q)
        for (role, linear), B in zip(seconds.items(), Bs, strict=True):
            up = self.module(linear, B if refit is None else B @ refit, behind)
            self.tally.count(linear, up)
            self.tally.compare(B @ A, self.moved(up.weight) @ A_q, self.inputs)
            pair.ups[role] = up

    def _in_gauge(self, A: Tensor, Bs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the factors in the gauge in which they are quantized; rounding to nearest takes the pair's own."""
        if self.quantizer.name == "rtn":
            return A, Bs
        change = mixed_gauge if self.quantizer.name == "gptq" else balanced_gauge
        up, down = change(torch.cat(Bs), A)
        return down, list(torch.split(up, [len(B) for B in Bs]))

    def moved(self, weight: Tensor) -> Tensor:
        """Return a weight on the device where the rounding runs, float32."""
        return weight.detach().to(self.device, torch.float32)

    def module(self, linear: nn.Linear, W: Tensor, inputs: Inputs | None) -> QuantizedLinear:
        """Return W (out, in) quantized, with the bias and on the device of the module that it stands for."""
        matrix = self.quantizer.quantize(W, self.spec, inputs)
        return QuantizedLinear(matrix, linear.bias).to(linear.weight.device)


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"a factor is {type(module).__name__}, not a dense linear module")
    return module


def matrix_paths(layer: Layer, plan: SitePlan) -> Iterator[str]:
    """Yield the path of every matrix that stands for a site: the members, or the factors they share."""
    if not isinstance(layer.at(plan.paths[0]), JointMember):
        yield from plan.paths
        return
    root = factors_path(plan)
    for name, module in layer.module.get_submodule(root).named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear | Int8Linear):
            yield f"{root}.{name}"
