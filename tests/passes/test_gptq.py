"""GPTQ against a textbook implementation in float64, and the output errors that it exists for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.passes.numerics.gptq import quantize_gptq
from rk_export.passes.numerics.quantize import QuantizedMatrix, quantize_rtn, unpack_bits
from rk_export.passes.numerics.scale_search import quantize_search, searched_scales

SPECS = [QuantSpec(*choice) for choice in itertools.product((2, 4, 8), (16, 32), (True, False))]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(columns: int, tokens: int = 2000, seed: int = 1) -> Tensor:
    """Return the second moment of correlated inputs of unequal sizes."""
    mix = random(columns, columns, seed=seed) / columns**0.5 + torch.eye(columns)
    x = random(tokens, columns, seed=seed + 1) @ mix * torch.linspace(0.2, 3, columns)
    return x.T @ x / tokens


def output_error(W: Tensor, quantized: QuantizedMatrix, second: Tensor) -> float:
    E = (quantized.dequantize() - W).double()
    return float((E @ second.double() * E).sum())


def textbook(W: Tensor, spec: QuantSpec, second: Tensor, damping: float) -> Tensor:
    """GPTQ as published, float64: errors spread with the Cholesky factor of the inverse (2210.17323)."""
    H = second.double() + damping * second.double().diagonal().mean() * torch.eye(len(second))
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    left, result, size = W.double().clone(), torch.empty_like(W), spec.block_size
    for start in range(0, W.shape[1], size):
        block = slice(start, start + size)
        weights = (1 / U.diagonal()[block].square()).float()
        scale, zero_point = searched_scales(left[:, block].T.float().contiguous(), weights, spec)
        for column in range(start, start + size):
            code = (left[:, column] / scale).round() + zero_point
            rounded = (code.clamp(0, 2**spec.bits - 1) - zero_point) * scale
            spread = (left[:, column] - rounded) / U[column, column]
            left[:, column:] -= spread[:, None] * U[column, column:]
            result[:, column] = rounded
    return result


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_first_sweep_is_gptq_as_published(spec: QuantSpec) -> None:
    """Inputs of one size: the columns then stay in their natural order."""
    second = second_moment(96)
    second = second / second.diagonal().sqrt() / second.diagonal().sqrt()[:, None]
    second.fill_diagonal_(1.0)
    W = random(40, 96)
    expected = textbook(W, spec, second, damping=0.05)
    actual = quantize_gptq(W, spec, second, damping=0.05, refinements=0).dequantize()
    # A tie that rounding breaks the other way changes the rest of its row.
    equal = torch.isclose(actual, expected, rtol=1e-3, atol=1e-5).all(1)
    assert float(equal.float().mean()) > 0.9


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("columns", [96, 71])
def test_outputs_come_out_closer_than_with_searched_scales(spec: QuantSpec, columns: int) -> None:
    W, second = random(48, columns), second_moment(columns)
    nearest = output_error(W, quantize_rtn(W, spec), second)
    searched = output_error(W, quantize_search(W, spec, second.diagonal()), second)
    swept = output_error(W, quantize_gptq(W, spec, second), second)
    assert searched < nearest
    assert swept < 0.8 * searched


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(4, 16, False), QuantSpec(8, 32)], ids=str)
def test_refinements_lower_the_error(spec: QuantSpec) -> None:
    W, second = random(64, 128), second_moment(128)
    errors = [
        output_error(W, quantize_gptq(W, spec, second, damping=1e-4, refinements=count), second)
        for count in (0, 1, 2, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.97 * errors[0]


def test_columns_come_back_in_their_own_order() -> None:
    W, second = random(16, 80), second_moment(80)
    shuffled = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    moment = second[shuffled][:, shuffled]
    matrix = quantize_gptq(W, QuantSpec(8, 32), moment)
    torch.testing.assert_close(matrix.dequantize(), W, rtol=0, atol=0.2)
    assert matrix.columns == 80


def test_rows_are_independent_of_each_other() -> None:
    W, second = random(20, 64), second_moment(64)
    whole = quantize_gptq(W, QuantSpec(4, 16), second)
    some = quantize_gptq(W[3:9], QuantSpec(4, 16), second)
    codes = unpack_bits(whole.codes, 4, 16)[3:9]
    assert float((codes != unpack_bits(some.codes, 4, 16)).float().mean()) < 0.01


def test_fp16_scales_are_rounded_before_the_codes_are_chosen() -> None:
    W, second = random(32, 64), second_moment(64)
    spec = QuantSpec(4, 32, symmetric=False)
    wide = quantize_gptq(W, spec, second)
    half = quantize_gptq(W, spec, second, scale_dtype=torch.float16)
    assert (wide.scales.dtype, half.scales.dtype) == (torch.float32, torch.float16)
    assert output_error(W, half, second) < 1.05 * output_error(W, wide, second)


def test_a_cross_moment_makes_up_for_errors_of_the_inputs() -> None:
    """Inputs x = T x₀ + noise: W T^-1 is the better matrix to quantize."""
    spec, W = QuantSpec(4, 32), random(32, 64)
    dense = random(4000, 64, seed=7)
    inputs = dense @ (torch.eye(64) + 0.1 * random(64, 64, seed=8)) + 0.05 * random(4000, 64, seed=9)
    second, cross = inputs.T @ inputs / 4000, dense.T @ inputs / 4000

    def error(matrix: QuantizedMatrix) -> float:
        return float((dense @ W.T - inputs @ matrix.dequantize().T).square().mean())

    without, aimed = quantize_gptq(W, spec, second), quantize_gptq(W, spec, second, cross=cross)
    assert error(aimed) < 0.5 * error(without)
    same = quantize_gptq(W, spec, second, cross=second)
    torch.testing.assert_close(same.dequantize(), without.dequantize(), rtol=0, atol=0.3)
    assert abs(error(same) / error(without) - 1) < 0.05


def test_moments_of_too_few_tokens_are_damped() -> None:
    W, x = random(16, 64), random(3, 64, seed=2) * 1e3
    few = quantize_gptq(W, QuantSpec(8, 32), x.T @ x / 3, damping=0.0).dequantize()
    assert float((few - W).norm()) < 0.05 * float(W.norm())
    nothing = quantize_gptq(W, QuantSpec(8, 32), torch.zeros(64, 64)).dequantize()
    assert float((nothing - W).norm()) < 0.01 * float(W.norm())


@pytest.mark.parametrize("second", [-torch.eye(64), torch.full((64, 64), torch.nan), torch.eye(32)])
def test_what_is_no_second_moment_is_refused(second: Tensor) -> None:
    with pytest.raises(ValueError, match="second moment"):
        quantize_gptq(random(4, 64), QuantSpec(4, 32), second)


def test_other_layouts_are_refused() -> None:
    with pytest.raises(TypeError, match="not blockwise"):
        quantize_gptq(random(4, 64), W8A8, torch.eye(64))
