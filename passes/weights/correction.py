"""Quantized matrices with a float branch of low rank that corrects their error (2410.06040)."""

from __future__ import annotations

from torch import Tensor, nn

from rk_export.options.quantization import QuantSpec
from rk_export.passes.modules.quantized import CorrectedLinear, QuantizedLinear, linear_of
from rk_export.passes.numerics.correction import quantize_corrected
from rk_export.passes.numerics.curvature import Inputs
from rk_export.passes.weights.quantizer import Quantizer


def corrected_linear(
    linear: nn.Linear, W: Tensor, rank: int, spec: QuantSpec, inputs: Inputs | None, quantizer: Quantizer
) -> CorrectedLinear:
    """Return what stands for a linear module whose quantization error is corrected.

    Args:
        linear: The module; gives the bias, the float type of the branch and the device.
        W: The matrix to stand for (out, in), on the device where it is quantized.
        rank: Of the branch, r.
        spec: Bits and blocks of the quantized matrix.
        inputs: What W multiplies; None weighs all columns alike.
        quantizer: How the matrix is rounded.

    Raises:
        ValueError: If the rank does not fit the matrix.
    """
    metric = None if inputs is None else inputs.metric
    parts = quantize_corrected(W, rank, lambda rest: quantizer.quantize(rest, spec, inputs), metric)
    dtype = linear.weight.dtype
    module = CorrectedLinear(
        QuantizedLinear(parts.matrix, linear.bias),
        linear_of(parts.down.to(dtype)),
        linear_of(parts.up.to(dtype)),
    )
    return module.to(linear.weight.device)


def empty_corrected(linear: nn.Linear, spec: QuantSpec, rank: int) -> CorrectedLinear:
    """Return a module of the right shapes on the meta device, to be filled by load_state_dict."""
    rows, columns = linear.out_features, linear.in_features
    return CorrectedLinear(
        QuantizedLinear.empty(rows, columns, spec, bias=linear.bias is not None),
        nn.Linear(columns, rank, bias=False, device="meta"),
        nn.Linear(rank, rows, bias=False, device="meta"),
    )
