"""The integer grids that quantized checkpoints store matrices on, and those that MatMulNBits holds as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.quantize import QuantizedMatrix, packed_matrix

_BITS, _BLOCKS = (2, 4, 8), (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Grid:
    """A matrix W (out, in) of codes: W = (code - zero point) * scale, by row and group of columns.

    Args:
        bits: Of a code.
        codes: uint8 (out, in), below 2**bits.
        scales: As stored, any float type (out, groups).
        zero_points: int16 (out, groups); None for 2**(bits - 1) everywhere.
        groups: Group of each column, int64 (in,).
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    groups: Tensor

    def dequantize(self) -> Tensor:
        """Return the matrix (out, in), float32."""
        values = self.codes.to(torch.float32)
        if self.zero_points is None:
            values -= 2 ** (self.bits - 1)
        else:
            values -= self.zero_points.to(torch.float32)[:, self.groups]
        values *= self.scales.to(torch.float32)[:, self.groups]
        return values

    def rows(self, part: Tensor) -> Grid:
        """Return the grid of some rows, given by their numbers, int64."""
        zero_points = None if self.zero_points is None else self.zero_points[part]
        return replace(self, codes=self.codes[part], scales=self.scales[part], zero_points=zero_points)

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return self.zero_points is None or bool((self.zero_points == 2 ** (self.bits - 1)).all())

    @property
    def group_size(self) -> int | None:
        """Columns of a group: all of them where there is one group, None where groups are not contiguous."""
        size = int((self.groups == 0).sum())
        contiguous = torch.arange(len(self.groups), device=self.groups.device) // max(size, 1)
        return size if torch.equal(self.groups, contiguous) else None


def why_not_carried(grid: Grid, float_dtype: str) -> str:
    """Return why MatMulNBits cannot hold a grid with equal codes and values, or an empty string.

    Args:
        grid: The grid.
        float_dtype: Float type of the graph, `fp32` or `fp16`; scales are of that type.
    """
    if grid.bits not in _BITS:
        return f"codes of {grid.bits} bits: MatMulNBits packs 2, 4 or 8"
    size = grid.group_size
    if size is None:
        return "the groups' columns do not lie side by side (act order): MatMulNBits has no group index"
    if _block_size(grid) is None:
        return f"groups of {size} columns are no whole blocks of at least {_BLOCKS[-1]}"
    if grid.zero_points is not None and not _fits(grid.zero_points, grid.bits):
        return f"a zero point lies outside 0 to {2**grid.bits - 1}"
    if float_dtype == "fp16" and grid.scales.dtype != torch.float16 and not _is_half(grid.scales):
        return "its scales are not exact in fp16, the float type of this graph"
    return ""


def block_spec(grid: Grid) -> QuantSpec:
    """Return the bits, blocks and symmetry with which MatMulNBits holds a grid.

    Raises:
        ValueError: If it cannot hold it, see `why_not_carried`.
    """
    block, reason = _block_size(grid), why_not_carried(grid, "fp32")
    if reason or block is None:
        raise ValueError(reason)
    return QuantSpec(grid.bits, block, symmetric=grid.is_symmetric)


def as_blocks(grid: Grid) -> QuantizedMatrix:
    """Return a grid in MatMulNBits' layout: equal codes, scales and zero points.

    A group wider than a block repeats its scale. Scales are fp16 where that is exact, else float32.

    Raises:
        ValueError: If MatMulNBits cannot hold it, see `why_not_carried`.
    """
    spec = block_spec(grid)
    rows, columns = grid.codes.shape
    block = spec.block_size
    groups = grid.groups[::block]  # of each block
    middle = torch.full_like(grid.scales, 2 ** (grid.bits - 1), dtype=torch.int16)
    zero_points = (middle if grid.zero_points is None else grid.zero_points)[:, groups]
    padding = zero_points[:, -1:].expand(rows, len(groups) * block - columns)
    codes = torch.cat([grid.codes, padding.to(torch.uint8)], dim=1).view(rows, len(groups), block)
    scales = grid.scales.to(torch.float16 if _is_half(grid.scales) else torch.float32)[:, groups]
    return packed_matrix(codes, scales.contiguous(), zero_points, columns, spec)


def _block_size(grid: Grid) -> int | None:
    """Return the widest block that groups are made of; a row with one scale takes any that divides it."""
    size = grid.group_size
    if size is None:
        return None
    if grid.scales.shape[1] == 1:
        return next((block for block in _BLOCKS[1:4] if size % block == 0), 32)
    return next((block for block in _BLOCKS if size % block == 0), None)


def _fits(zero_points: Tensor, bits: int) -> bool:
    return bool(((zero_points >= 0) & (zero_points < 2**bits)).all())


def _is_half(scales: Tensor) -> bool:
    """Whether scales are exact in fp16."""
    wide = scales.to(torch.float32)
    return torch.equal(wide, wide.to(torch.float16).to(torch.float32))
