"""Formats of quantized matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rk_export.errors import FieldError


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix is quantized: blockwise and weight-only, or to int8 together with its input.

    Args:
        bits: 2, 4 or 8.
        block_size: Columns that share a scale: a power of two from 16 to 256; 0 is one scale a row of the matrix.
        symmetric: No stored zero points.
        activations: 16 leaves the input in floats; 8 quantizes it to int8 as it arrives (W8A8), which takes
            8 bits, block size 0 and symmetric weights.
    """

    bits: int
    block_size: int
    symmetric: bool = True
    activations: int = 16

    def __post_init__(self) -> None:
        if self.activations == 8 and (self.bits, self.block_size, self.symmetric) == (8, 0, True):
            return
        if self.activations != 16:
            raise FieldError(
                f"{self.activations}-bit activations do not go with {self.bits} bits in blocks of {self.block_size}",
                where="quantize.activations",
                fix="8-bit activations take bits 8, block_size 0 and symmetric weights; 16 leaves them in floats",
            )
        if self.bits not in (2, 4, 8):
            raise FieldError(
                f"{self.bits} bits cannot be packed",
                where="quantize.bits",
                fix="choose 2, 4 or 8",
            )
        if self.block_size not in (16, 32, 64, 128, 256):
            raise FieldError(
                f"a block of {self.block_size} columns is not supported",
                where="quantize.block",
                fix="choose 16, 32, 64, 128 or 256",
            )

    def details(self) -> dict[str, Any]:
        """Return what a finding says of it."""
        inputs = {"activations": 8} if self.activations == 8 else {"block": self.block_size}
        return {"bits": self.bits, **inputs}


# Weight-only INT8 and INT4 as the command line's defaults have them, and int8 weights with int8 inputs.
W8A8 = QuantSpec(8, 0, activations=8)
