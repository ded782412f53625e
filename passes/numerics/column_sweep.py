"""The column-by-column rounding that GPTQ and its refinement have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.quantize import QuantizedMatrix, packed_matrix, rounded_scales
from rk_export.passes.numerics.scale_search import searched_scales
from rk_export.passes.numerics.threads import cpu_threads

_TINY = 1e-30
# From so many entries on, the products between blocks gain from more than one thread.
_LARGE = 2**22


@dataclass
class ColumnSweep:
    """A matrix on its way through the sweeps: transposed, columns padded to whole blocks, in processing order.

    Args:
        target: What is approximated (K, N), float32.
        error: Target minus quantized (K, N).
        scales: As they are stored, in float32 (blocks, N).
        zero_points: In float32 (blocks, N).
        order: Original column of each row of the above, (K,).
        spec: Bits, block size and symmetry.
        scale_dtype: Float type of the stored scales.
        threads: For the products between blocks; everything else is too short for more than one.
    """

    target: Tensor
    error: Tensor
    scales: Tensor
    zero_points: Tensor
    order: Tensor
    spec: QuantSpec
    scale_dtype: torch.dtype
    threads: int

    @classmethod
    def start(cls, W: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, order: Tensor) -> ColumnSweep:
        """Begin with nothing quantized."""
        padded = torch.nn.functional.pad(W.detach().to(torch.float32), (0, len(order) - W.shape[1]))
        target = padded[:, order].T.contiguous()
        scales = target.new_zeros(len(order) // spec.block_size, W.shape[0])
        threads = torch.get_num_threads() if target.numel() >= _LARGE else 1
        error = torch.zeros_like(target)
        return cls(target, error, scales, scales.clone(), order, spec, scale_dtype, threads)

    def first(self, feedback: Tensor, weights: Tensor) -> None:
        """Choose each block's scale where the sweep reaches it, and round its columns.

        The scale fits the values that would make up best for the errors so far if the block and all after it
        stayed in floats: W + Σ_i e_i U_ib (I + U_bb)^-1 for the columns b of the block.

        Args:
            feedback: U (K, K), strictly upper triangular.
            weights: D (K,).
        """
        for block, rows in self._blocks():
            before, inside = slice(0, rows.start), feedback[rows, rows]
            moved = self._product(feedback[before, rows].T, self.error[before])
            best = self.target[rows] + torch.linalg.solve_triangular(
                inside.T, moved, upper=False, unitriangular=True
            )
            scales, self.zero_points[block] = searched_scales(best, weights[rows], self.spec)
            self._set_scales(block, scales)
            self._round(block, rows, self.target[rows] + moved, inside)

    def again(self, pull: Tensor, diagonal: Tensor) -> None:
        """Regress each block's scales on its codes, then round its columns anew, given all other columns.

        Args:
            pull: H_ij / H_jj (K, K), zero on the diagonal.
            diagonal: H_jj (K,).
        """
        for block, rows in self._blocks():
            inside = pull[rows, rows]
            pulled = self._product(pull[:, rows].T, self.error)
            codes = self._codes(block, rows)
            weighted = codes * diagonal[rows, None]
            slope = (weighted * (pulled + self.error[rows])).sum(0)
            curvature = (weighted * (inside.T @ codes + codes)).sum(0).clamp_min_(_TINY)
            old = self.scales[block].clone()
            self._set_scales(block, old + slope / curvature)
            moved = codes * (old - self.scales[block])
            self.error[rows] += moved
            self._round(block, rows, self.target[rows] + pulled + inside.T @ moved, inside)

    def result(self, columns: int) -> QuantizedMatrix:
        """Return the quantized matrix with its columns in their own order."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=place.device)
        size = self.spec.block_size
        codes = torch.cat([self._codes(block, rows) for block, rows in self._blocks()])
        codes += self.zero_points.repeat_interleave(size, 0)
        blocks = place[::size] // size
        return packed_matrix(
            codes[place].T.reshape(-1, len(blocks), size),
            self.scales[blocks].T.to(self.scale_dtype),
            self.zero_points[blocks].T,
            columns,
            self.spec,
        )

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        size = self.spec.block_size
        for block in range(len(self.scales)):
            yield block, slice(block * size, (block + 1) * size)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        with cpu_threads(self.threads):
            return left @ right

    def _set_scales(self, block: int, scales: Tensor) -> None:
        self.scales[block] = rounded_scales(scales, self.scale_dtype).to(torch.float32)

    def _codes(self, block: int, rows: slice) -> Tensor:
        """Return the codes of a block, zero point subtracted, (block, N)."""
        divisor = torch.where(self.scales[block] == 0, 1, self.scales[block])
        return (self.target[rows] - self.error[rows]).div_(divisor).round_()

    def _round(self, block: int, rows: slice, current: Tensor, feedback: Tensor) -> None:
        """Round the columns of one block in turn; the change of a column's error moves the columns after it.

        Args:
            block: Which.
            rows: Where its columns are.
            current: The columns (block, N) with the errors of all other blocks made up for; overwritten.
            feedback: What an error moves the other columns by, (block, block).
        """
        scale, zero_point = self.scales[block], self.zero_points[block]
        inverse = torch.where(scale == 0, 0, 1 / scale)
        low, high = -zero_point, 2**self.spec.bits - 1 - zero_point
        # All in units of the scale, which a whole block shares.
        current *= inverse
        changes = (self.target[rows] - self.error[rows]) * inverse
        codes = torch.empty_like(current)
        for column, (value, code, change) in enumerate(zip(current, codes, changes, strict=True)):
            torch.round(value, out=code).clamp_(low, high)
            change -= code
            current[column + 1 :].addr_(feedback[column, column + 1 :], change)
        torch.addcmul(self.target[rows], codes, scale, value=-1, out=self.error[rows])


def in_order(second: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return a second moment in processing order, float32, with `damping` added to its diagonal; columns are padded."""
    missing = len(order) - len(second)
    padded = torch.nn.functional.pad(second, (0, missing, 0, missing)) if missing else second
    H = padded[order[:, None], order]
    H.diagonal().add_(damping)
    return H
