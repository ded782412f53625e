"""Scale search against rounding to nearest and against a dense grid of scales in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.passes.numerics import scale_search
from rk_export.passes.numerics.quantize import QuantizedMatrix, quantize_rtn
from rk_export.passes.numerics.scale_search import quantize_search

SPECS = [QuantSpec(*choice) for choice in itertools.product((2, 4, 8), (16, 32, 256), (True, False))]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Heavy tails: what scale search is for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3


def column_weights(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(5)) ** 2 + 0.01


def block_errors(W: Tensor, quantized: QuantizedMatrix, weights: Tensor) -> Tensor:
    """Return the weighted square error of each block, float64 (rows, blocks)."""
    squares = (quantized.dequantize().double() - W.double()).square() * weights.double()
    size = quantized.spec.block_size
    padded = torch.nn.functional.pad(squares, (0, -W.shape[1] % size))
    return padded.view(len(W), -1, size).sum(-1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("columns", [256, 71])
def test_no_block_is_worse_than_rounded_to_nearest_and_most_are_better(spec: QuantSpec, columns: int) -> None:
    W, alike = matrix(40, columns), torch.ones(columns)
    nearest = block_errors(W, quantize_rtn(W, spec), alike)
    searched = block_errors(W, quantize_search(W, spec), alike)
    # What a trial explains of a block is told from float32 sums: of 8-bit blocks that is nearly all.
    assert bool((searched <= nearest * (1.1 if spec.bits == 8 else 1.0001)).all())
    assert float(searched.sum()) < (1.0 if spec.bits == 8 else 0.97) * float(nearest.sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_weights_move_the_error_to_columns_that_count_less(spec: QuantSpec) -> None:
    W, weights = matrix(40, 256), column_weights(256)
    alike = block_errors(W, quantize_search(W, spec), weights).sum()
    weighted = block_errors(W, quantize_search(W, spec, weights), weights).sum()
    assert float(weighted) < 0.99 * float(alike)


@pytest.mark.parametrize("spec", [QuantSpec(2, 16), QuantSpec(4, 16), QuantSpec(4, 32)], ids=str)
def test_symmetric_search_comes_near_a_dense_grid_of_both_signs(spec: QuantSpec) -> None:
    heavy, weights = matrix(200, spec.block_size), column_weights(spec.block_size)
    W = heavy.sign() * heavy.abs() ** 0.5
    best = torch.full((200, 1), float("inf"), dtype=torch.float64)
    half = 2 ** (spec.bits - 1)
    wide, extreme = W.double(), W.double().abs().amax(1, keepdim=True) / half
    for share in torch.linspace(-2.1, 2.1, 2101, dtype=torch.float64):
        scale = extreme * share
        rounded = (wide / scale).round().clamp(-half, half - 1) * scale
        error = ((rounded - wide).square() * weights.double()).sum(1, keepdim=True)
        best = torch.minimum(best, error)
    found = block_errors(W, quantize_search(W, spec, weights, damping=0.0), weights)
    assert float(found.sum()) < 1.25 * float(best.sum())


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(4, 32, False)], ids=str)
def test_matrices_that_do_not_fit_at_once_are_cut_by_rows(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = matrix(50, 64)
    whole = quantize_search(W, spec)
    monkeypatch.setattr(scale_search, "_CPU_ENTRIES", 7 * 32)
    parts = quantize_search(W, spec)
    assert torch.equal(whole.codes, parts.codes)
    torch.testing.assert_close(whole.scales, parts.scales)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_and_constant_blocks_are_exact(spec: QuantSpec) -> None:
    W = torch.zeros(3, 2 * spec.block_size)
    W[1, : spec.block_size] = 0.75
    W[2, spec.block_size :] = -0.75
    torch.testing.assert_close(quantize_search(W, spec).dequantize(), W, rtol=1e-6, atol=0)


def test_inputs_that_were_never_seen_still_count() -> None:
    """A block whose weights are all zero is rounded as if its columns weighed alike."""
    W, weights = matrix(8, 64), torch.cat([torch.ones(32), torch.zeros(32)])
    dequantized = quantize_search(W, QuantSpec(4, 32), weights).dequantize()
    alike = quantize_search(W, QuantSpec(4, 32)).dequantize()
    torch.testing.assert_close(dequantized[:, 32:], alike[:, 32:])


@settings(max_examples=40, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    magnitude=st.floats(1e-9, 1e9),
    weight=st.floats(1e-9, 1e9),
    seed=st.integers(0, 99),
)
def test_units_do_not_matter(spec: QuantSpec, magnitude: float, weight: float, seed: int) -> None:
    """Equal up to near ties: another choice of the same worth."""
    W, weights = matrix(3, 48, seed), column_weights(48)
    scaled = quantize_search(W * magnitude, spec, weights * weight).dequantize() / magnitude
    plain = quantize_search(W, spec, weights).dequantize()
    errors = [float(((each - W).square() * weights).sum()) for each in (plain, scaled)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_other_layouts_are_refused() -> None:
    with pytest.raises(TypeError, match="not blockwise"):
        quantize_search(matrix(4, 32), W8A8)
