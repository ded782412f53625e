"""Accuracy level 4 of ONNX Runtime's MatMulNBits, emulated: its CPU kernels round the inputs to int8.

A row x (K,) of inputs is cut along K into the blocks of the matrix; each block becomes codes
round(127 x / max|x|) in -127..127 under a scale of its own. The products of codes are summed exactly, so the product
equals that of the rounded inputs with the dequantized matrix. One large value makes its whole block coarse.

Measured against ONNX Runtime 1.31.1 on x86-64 (4 and 8 bits, blocks 16 to 256, 2 bits from 32 on): the emulated
product differs from the runtime's by float rounding alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rk_export.options.quantization import QuantSpec

LEVELS = 127
# The CPU provider has no int8 kernel for 2-bit codes in blocks of 16 and computes them in floats.
_SMALLEST_TWO_BIT_BLOCK = 32


def has_int8_kernel(spec: QuantSpec) -> bool:
    """Whether accuracy level 4 rounds the inputs of a matrix in this format on the CPU provider."""
    blockwise = spec.block_size > 0
    return blockwise and (spec.bits > 2 or spec.block_size >= _SMALLEST_TWO_BIT_BLOCK)


def int8_inputs(x: Tensor, spec: QuantSpec) -> Tensor:
    """Return inputs x (..., K) as accuracy level 4 reads them in front of a matrix in the format `spec`.

    Args:
        x: Inputs, any float type; a last block that K does not fill is padded with zeros.
        spec: Bits and block size of the matrix.

    Returns:
        The rounded inputs in the type of x; x itself where the runtime has no int8 kernel for the format.
    """
    if not has_int8_kernel(spec):
        return x
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -columns % spec.block_size))
    blocks = padded.view(*padded.shape[:-1], -1, spec.block_size)
    scales = blocks.abs().amax(-1, keepdim=True) / LEVELS
    inverse = torch.where(scales == 0, 0, 1 / scales)
    rounded = (blocks * inverse).round() * scales
    return rounded.flatten(-2)[..., :columns].to(x.dtype)
