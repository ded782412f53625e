"""What the quantization of a site costs and saves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rk_export.passes.modules.quantized import QuantizedLinear
from rk_export.passes.numerics.curvature import Inputs
from rk_export.passes.numerics.quantize import quantized_bytes
from rk_export.passes.numerics.threads import total

_SAMPLED_ROWS = 512  # of a matrix, from which the error of its outputs is estimated


@dataclass
class QuantizationTally:
    """What the quantization of a site's matrices did so far: bytes and squared errors."""

    before: int = 0
    after: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    weighted_squared_error: float = 0.0
    weighted_squared_norm: float = 0.0

    def count(self, linear: nn.Linear, quantized: QuantizedLinear, *branch: nn.Linear) -> None:
        """Count the bytes of a matrix before, and of what stands for it: packed, and float matrices beside it."""
        self.before += _float_bytes(linear)
        rows, columns, scale_bytes = linear.out_features, linear.in_features, quantized.scales.element_size()
        self.after += quantized_bytes(rows, columns, quantized.spec, scale_bytes)
        self.after += sum(_float_bytes(part) for part in branch)

    def compare(self, target: Tensor, quantized: Tensor, inputs: Inputs | None) -> None:
        """Count the error of a matrix, or of a pair's product, both (out, in)."""
        difference = quantized - target
        self.squared_error += _square(difference)
        self.squared_norm += _square(target)
        if inputs is not None:
            # The product with a moment costs as much as rounding the matrix: of a large one it is estimated.
            step = max(1, len(target) // _SAMPLED_ROWS)
            self.weighted_squared_error += step * inputs.mean_square(difference[::step])
            self.weighted_squared_norm += step * inputs.mean_square(target[::step])

    @property
    def is_weighted(self) -> bool:
        """Whether any error was weighed by what its matrix reads."""
        return self.weighted_squared_norm > 0

    @property
    def error(self) -> float:
        """The relative Frobenius error."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0

    @property
    def weighted_error(self) -> float:
        """The relative error of the outputs; of matrices of 1,024 rows and more it is estimated from some rows."""
        norm = self.weighted_squared_norm
        return (self.weighted_squared_error / norm) ** 0.5 if norm else 0.0


def _square(matrix: Tensor) -> float:
    return float(total(matrix.double().square()))


def _float_bytes(linear: nn.Linear) -> int:
    return linear.weight.numel() * linear.weight.element_size()
