"""Int8 matrix products with int8 inputs (W8A8): one scale for each row of the matrix and for each token.

A token x becomes codes round(127 x / max|x|) in -127..127 as it arrives, so what a token computes does not depend
on the tokens beside it, and one with huge values spoils no other. A matrix W (N, K) is stored as codes in
-127..127 with one scale a row. The products of codes are summed exactly in 32 bits:
y = (codes of x · codes of W) * (scale of W / 127) * max|x|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127
# The step of a token whose largest value is 1, in float32 as the graph holds it.
STEP = float(torch.tensor(1 / LEVELS, dtype=torch.float32))
# A token of zeros has no largest value to divide by.
SMALLEST_PEAK = 1e-30


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in int8.

    Args:
        codes: int8 (N, K), from -127 to 127.
        scales: float32 (N,).
    """

    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """Return the matrix (N, K) in float32."""
        return self.codes * self.scales[:, None]


def quantize_rows(W: Tensor) -> Int8Matrix:
    """Round W (N, K) to int8, the largest value of each row to the code 127 or -127."""
    wide = W.to(torch.float32)
    scales = wide.abs().amax(1) / LEVELS
    divisor = torch.where(scales == 0, 1, scales)
    return Int8Matrix((wide / divisor[:, None]).round().to(torch.int8), scales)


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of tokens x (..., K), as whole numbers in float32, and their peaks max|x| (..., 1).

    The operations and their order are those of the exported graph, so equal inputs get equal codes.
    """
    wide = x.to(torch.float32)
    peaks = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_PEAK)
    return ((wide / peaks) / STEP).round(), peaks


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the product of tokens x (..., K) and an int8 matrix (N, K), float32 (..., N)."""
    tokens, peaks = token_codes(x)
    sums = torch.nn.functional.linear(tokens, codes.to(torch.float32))
    return sums * (scales * STEP) * peaks


def int8_bytes(rows: int, columns: int) -> int:
    """Return the stored bytes of a (rows, columns) matrix in int8, scales included."""
    return rows * (columns + 4)
