"""How one matrix is rounded: to nearest, with searched scales, or by GPTQ, as far as its inputs are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.curvature import Inputs
from rk_export.passes.numerics.gptq import quantize_gptq
from rk_export.passes.numerics.quantize import QuantizedMatrix, by_rows, quantize_rtn, stacked
from rk_export.passes.numerics.scale_search import quantize_search

QuantizerName = Literal["rtn", "search", "gptq"]


@dataclass(frozen=True)
class Quantizer:
    """A way to round matrices.

    Args:
        name: `rtn`, `search` or `gptq`.
        scale_dtype: Float type of the stored scales.
    """

    name: QuantizerName
    scale_dtype: torch.dtype

    def on(self, inputs: Inputs | None) -> Quantizer:
        """Return what is used for such inputs: without a full second moment GPTQ becomes a search of the scales."""
        full = inputs is not None and inputs.second.ndim == 2
        return self if full or self.name != "gptq" else Quantizer("search", self.scale_dtype)

    def quantize(self, W: Tensor, spec: QuantSpec, inputs: Inputs | None) -> QuantizedMatrix:
        """Return W (N, K), which multiplies such inputs, quantized; None weighs all columns alike.

        Raises:
            TypeError: If the spec has no blocks.
            InputError: If a scale does not fit the scales' type.
            ValueError: If the second moment is none.
        """
        second = None if inputs is None else inputs.second
        if self.on(inputs).name == "gptq" and second is not None:
            return quantize_gptq(W, spec, second, scale_dtype=self.scale_dtype)
        weights = second.diagonal() if second is not None and second.ndim == 2 else second

        def rounded(rows: Tensor) -> QuantizedMatrix:
            if self.name == "rtn":
                return quantize_rtn(rows, spec, scale_dtype=self.scale_dtype)
            return quantize_search(rows, spec, weights, scale_dtype=self.scale_dtype)

        return stacked([rounded(rows) for rows in by_rows(W)])
