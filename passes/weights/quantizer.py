"""How one matrix is rounded: to nearest, with searched scales, or by GPTQ, as far as its inputs are known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.base import SiteStatistics
from rk_export.passes.numerics.gptq import quantize_gptq
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.quantize import QuantizedMatrix, quantize_rtn
from rk_export.passes.numerics.scale_search import quantize_search

QuantizerName = Literal["rtn", "search", "gptq"]


@dataclass(frozen=True)
class Inputs:
    """What is known about the vectors that a matrix multiplies.

    Args:
        second: Their second moment (in, in), (in,) where only the diagonal is known, or None.
        cross: E[x₀ xᵀ] (in, in), x₀ the dense model's input; None where it is x itself.
    """

    second: Tensor | None = None
    cross: Tensor | None = None

    @classmethod
    def of(cls, statistics: SiteStatistics | None, device: torch.device) -> Inputs:
        """Return the inputs that a site's statistics describe, on a device."""
        if statistics is None:
            return cls()
        second, cross = statistics.inputs.second, statistics.inputs.cross
        return cls(second.to(device), None if cross is None else cross.to(device))

    @cached_property
    def metric(self) -> Metric | None:
        """The damped metric of the second moment, or None."""
        return None if self.second is None else Metric.of(self.second)

    def aimed(self, W: Tensor) -> Tensor:
        """Return the map of the present inputs that comes closest to W x₀ (W itself without a cross moment)."""
        if self.metric is None or self.cross is None:
            return W
        return self.metric.unweighted(self.metric.target(W, self.cross)).to(W.dtype)

    def square(self, E: Tensor) -> float:
        """Return the mean of |E x|², or of all entries' squares alike where nothing is known."""
        if self.second is None:
            return float(E.double().square().sum())
        weighted = E * self.second if self.second.ndim == 1 else E @ self.second.to(E.dtype)
        return max(0.0, float((weighted * E).sum(dtype=torch.float64)))

    def behind(self, down: Tensor) -> Inputs:
        """Return what is known about A x for A (k, in)."""
        if self.metric is None:
            return Inputs()
        weighted = self.metric.columns(down)
        return Inputs((weighted @ weighted.mT).to(torch.float32))


@dataclass(frozen=True)
class Quantizer:
    """A way to round matrices.

    Args:
        name: `rtn`, `search` or `gptq`.
        scale_dtype: Float type of the stored scales.
    """

    name: QuantizerName
    scale_dtype: torch.dtype

    def on(self, inputs: Inputs) -> Quantizer:
        """Return what is used for such inputs: without a full second moment GPTQ becomes a search of the scales."""
        full = inputs.second is not None and inputs.second.ndim == 2
        return self if full or self.name != "gptq" else Quantizer("search", self.scale_dtype)

    def quantize(self, W: Tensor, spec: QuantSpec, inputs: Inputs) -> QuantizedMatrix:
        """Return W (N, K), which multiplies such inputs, quantized.

        Raises:
            TypeError: If the spec has no blocks.
            InputError: If a scale does not fit the scales' type.
            ValueError: If the second moment is none.
        """
        if self.name == "rtn":
            return quantize_rtn(W, spec, scale_dtype=self.scale_dtype)
        if self.on(inputs).name == "gptq" and inputs.second is not None:
            return quantize_gptq(W, spec, inputs.second, scale_dtype=self.scale_dtype)
        weights = inputs.second
        if weights is not None and weights.ndim == 2:
            weights = weights.diagonal()
        return quantize_search(W, spec, weights, scale_dtype=self.scale_dtype)
