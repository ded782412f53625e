"""Weight-only blockwise quantization in the layout of ONNX Runtime's MatMulNBits.

A matrix W (N, K) is cut along K into blocks; each block has one scale and, when asymmetric, one zero point:
W ~ (code - zero_point) * scale with codes of 2, 4 or 8 bits. Codes are packed low bits first into
(N, blocks, block_size * bits / 8) bytes, zero points into (N, ceil(blocks * bits / 8)) bytes. A last block
that K does not fill is padded with codes of value zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.threads import total

_FP16_NORMAL = torch.finfo(torch.float16).smallest_normal
_FP16_STEP = 2.0**-24  # between neighbours below the normal range
# Entries of a matrix that are worked on at a time; its rows are rounded independently of each other.
_ENTRIES = 1 << 25
_FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix as MatMulNBits stores it.

    Args:
        codes: Packed codes, uint8 (N, blocks, block_size * bits / 8).
        scales: Scales, float (N, blocks).
        zero_points: Packed zero points, uint8 (N, ceil(blocks * bits / 8)), or None when symmetric.
        columns: K, the input features.
        spec: Bits, block size and symmetry.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    columns: int
    spec: QuantSpec

    def dequantize(self) -> Tensor:
        """Return the matrix (N, K), float32."""
        return dequantize(self.codes, self.scales, self.zero_points, self.columns, self.spec)

    def relative_error(self, W: Tensor) -> float:
        """Return the Frobenius error against W (N, K), relative to W."""
        error = norm = 0.0
        begin = 0
        for rows in by_rows(W):
            zero_points = None if self.zero_points is None else self.zero_points[begin : begin + len(rows)]
            part = dequantize(
                self.codes[begin : begin + len(rows)],
                self.scales[begin : begin + len(rows)],
                zero_points,
                self.columns,
                self.spec,
            )
            error += float(total((part.to(rows.device) - rows).square_()))
            norm += float(total(rows.square()))
            begin += len(rows)
        return (error / norm) ** 0.5 if norm else 0.0


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack integers below 2**bits (..., n) into bytes (..., ceil(n * bits / 8)), low bits first."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(values.to(torch.uint8), (0, -values.shape[-1] % per_byte))
    lanes = padded.view(*padded.shape[:-1], -1, per_byte)
    packed = torch.zeros_like(lanes[..., 0])
    for lane in range(per_byte):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: bytes (..., m) to uint8 values (..., count)."""
    mask = 2**bits - 1
    lanes = torch.stack([(packed >> (bits * lane)) & mask for lane in range(8 // bits)], dim=-1)
    return lanes.flatten(-2)[..., :count]


def block_scales(blocks: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return round-to-nearest scales and zero points, both (N, blocks), for W cut to (N, blocks, block).

    Symmetric scales let the extreme value of the block, sign included, take the code 0, so the whole range
    of codes is used; asymmetric ones span the block's range with zero in it.
    """
    levels = 2**spec.bits - 1
    high, low = blocks.amax(-1), blocks.amin(-1)
    if spec.symmetric:
        extreme = torch.where(high > -low, high, low)
        scales = extreme / -(2.0 ** (spec.bits - 1))
        zero_points = torch.full_like(scales, 2 ** (spec.bits - 1))
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
        scales = (high - low) / levels
        zero_points = torch.where(scales == 0, torch.zeros_like(low), -low / scales).round().clamp(0, levels)
    return scales, zero_points


def rounded_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as they are stored, in `dtype`.

    Below fp16's normal range they are rounded away from zero: there a nearest value may be much smaller, and
    would clip the block; a scale of zero stays zero.

    Raises:
        InputError: If a scale is beyond fp16's range.
    """
    if dtype is not torch.float16:
        return scales.to(dtype)
    largest = float(scales.abs().max()) if scales.numel() else 0.0
    if largest > _FP16_MAX:
        raise InputError(
            f"a scale of {largest:.3g} does not fit into fp16",
            where="quantization",
            fix="keep this matrix in floats (quant null in the plan)",
        )
    upward = (scales.abs() / _FP16_STEP).ceil() * _FP16_STEP * scales.sign()
    return torch.where(scales.abs() < _FP16_NORMAL, upward, scales).to(dtype)


def check_blockwise(spec: QuantSpec) -> None:
    """Refuse a spec without blocks: W8A8 matrices have one scale a row and another layout.

    Raises:
        TypeError: If the spec's block size is 0.
    """
    if spec.block_size == 0:
        raise TypeError(f"{spec} is not blockwise")


def nearest_codes(values: Tensor, scales: Tensor, zero_points: Tensor, spec: QuantSpec) -> Tensor:
    """Return the codes, as floats, whose values (code - zero_point) * scale are nearest; shapes broadcast."""
    divisor = torch.where(scales == 0, 1, scales)
    return (values / divisor).round_().add_(zero_points).clamp_(0, 2**spec.bits - 1)


def quantize_rtn(W: Tensor, spec: QuantSpec, *, scale_dtype: torch.dtype = torch.float32) -> QuantizedMatrix:
    """Quantize W (N, K) by rounding to nearest.

    Scales are rounded to `scale_dtype` before the codes are chosen, so codes fit the scales that are stored.

    Raises:
        TypeError: If the spec has no blocks.
        InputError: If a scale does not fit `scale_dtype`.
    """
    check_blockwise(spec)
    N, K = W.shape
    blocks = math.ceil(K / spec.block_size)
    padded = torch.nn.functional.pad(W.to(torch.float32), (0, blocks * spec.block_size - K))
    cut = padded.view(N, blocks, spec.block_size)
    scales, zero_points = block_scales(cut, spec)
    scales = rounded_scales(scales, scale_dtype)
    codes = nearest_codes(cut, scales.to(torch.float32)[..., None], zero_points[..., None], spec)
    return packed_matrix(codes, scales, zero_points, K, spec)


def packed_matrix(
    codes: Tensor, scales: Tensor, zero_points: Tensor, columns: int, spec: QuantSpec
) -> QuantizedMatrix:
    """Pack codes (N, blocks, block), scales and zero points (N, blocks) of a matrix with `columns` columns."""
    return QuantizedMatrix(
        codes=pack_bits(codes, spec.bits),
        scales=scales,
        zero_points=None if spec.symmetric else pack_bits(zero_points, spec.bits),
        columns=columns,
        spec=spec,
    )


def by_rows(W: Tensor) -> tuple[Tensor, ...]:
    """Return a matrix (N, K) in pieces of some rows each, so that what is made of one stays small beside the matrix."""
    return torch.split(W, max(1, _ENTRIES // W.shape[1]))


def stacked(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Return the rows of several quantized matrices as one; all have the same columns and spec."""
    first, *others = parts
    if not others:
        return first
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zero_points=torch.cat(zero_points) if zero_points else None,
    )


def dequantize(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, columns: int, spec: QuantSpec
) -> Tensor:
    """Return (code - zero_point) * scale as a float32 matrix (N, columns).

    Args:
        codes: Packed codes, uint8 (N, blocks, block_size * bits / 8).
        scales: Scales (N, blocks).
        zero_points: Packed zero points, uint8 (N, ceil(blocks * bits / 8)), or None for 2**(bits - 1).
        columns: K.
        spec: Bits and block size.
    """
    values = unpack_bits(codes, spec.bits, spec.block_size).to(torch.float32)
    if zero_points is None:
        values -= 2 ** (spec.bits - 1)
    else:
        values -= unpack_bits(zero_points, spec.bits, scales.shape[1])[..., None].to(torch.float32)
    values *= scales[..., None]
    return values.flatten(1)[:, :columns]


def quantized_bytes(rows: int, columns: int, spec: QuantSpec, scale_bytes: int = 2) -> int:
    """Return the stored bytes of a quantized (rows, columns) matrix, scales and zero points included."""
    blocks = math.ceil(columns / spec.block_size)
    zero_point_bytes = 0 if spec.symmetric else math.ceil(blocks * spec.bits / 8)
    return rows * (blocks * (spec.block_size * spec.bits // 8 + scale_bytes) + zero_point_bytes)
