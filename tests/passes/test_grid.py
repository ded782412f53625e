"""Grids of quantized checkpoints: their values, and the layout of MatMulNBits with equal codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.grid import Grid, as_blocks, why_not_carried
from rk_export.passes.numerics.quantize import unpack_bits


def grid(bits: int = 4, columns: int = 64, size: int = 32, rows: int = 8, *, zeros: bool = True) -> Grid:
    generator = torch.Generator().manual_seed(bits + columns)
    groups = torch.arange(columns) // size
    count = int(groups.max()) + 1
    zero_points = torch.randint(0, 2**bits, (rows, count), generator=generator).to(torch.int16)
    return Grid(
        bits,
        torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8),
        torch.randn((rows, count), generator=generator).half(),
        zero_points if zeros else None,
        groups,
    )


def test_values_are_those_of_the_definition() -> None:
    case = grid()
    assert case.zero_points is not None
    for row, column in ((0, 0), (3, 31), (3, 32), (7, 63)):
        group = column // 32
        expected = (int(case.codes[row, column]) - int(case.zero_points[row, group])) * float(
            case.scales[row, group]
        )
        assert float(case.dequantize()[row, column]) == expected


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        (grid(), QuantSpec(4, 32, symmetric=False)),
        (grid(zeros=False), QuantSpec(4, 32)),
        (grid(2, 48, 16), QuantSpec(2, 16, symmetric=False)),
        (grid(8, 512, 512), QuantSpec(8, 128, symmetric=False)),  # one group a row
        (grid(4, 40, 40), QuantSpec(4, 32, symmetric=False)),  # a last block that is not full
        (grid(4, 192, 96), QuantSpec(4, 32, symmetric=False)),  # groups of three blocks
        (grid(4, 80, 64), QuantSpec(4, 64, symmetric=False)),  # a last group that is not full
    ],
)
def test_blocks_have_equal_codes_and_values(case: Grid, spec: QuantSpec) -> None:
    matrix = as_blocks(case)
    columns = case.codes.shape[1]
    assert matrix.spec == spec
    codes = unpack_bits(matrix.codes, case.bits, spec.block_size).flatten(1)[:, :columns]
    assert torch.equal(codes, case.codes)
    assert torch.equal(matrix.dequantize(), case.dequantize())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (grid(3), "codes of 3 bits"),
        (replace(grid(), groups=torch.arange(64) % 2), "act order"),
        (grid(4, 64, 8), "groups of 8 columns"),
        (grid(4, 60, 20), "groups of 20 columns"),
        (replace(grid(), zero_points=torch.full((8, 2), 16, dtype=torch.int16)), "outside 0 to 15"),
    ],
)
def test_what_the_operator_cannot_hold_is_said(case: Grid, reason: str) -> None:
    assert reason in why_not_carried(case, "fp32")
    with pytest.raises(ValueError, match=reason.split()[0]):
        as_blocks(case)


def test_scales_beyond_fp16_need_a_graph_in_fp32() -> None:
    fine = replace(grid(), scales=torch.full((8, 2), 1 + 2.0**-20))
    assert why_not_carried(fine, "fp32") == ""
    assert "fp16" in why_not_carried(fine, "fp16")
    assert as_blocks(fine).scales.dtype is torch.float32
    assert as_blocks(grid()).scales.dtype is torch.float16
