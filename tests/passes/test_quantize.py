"""Quantization against ONNX Runtime: its quantizer's bytes, and what its kernels read from ours."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import _pybind_state
from ort_nodes import run_node
from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.quantize import (
    QuantizedMatrix,
    dequantize,
    pack_bits,
    quantize_rtn,
    quantized_bytes,
    unpack_bits,
)

BITS, BLOCKS, SYMMETRIES = (2, 4, 8), (16, 32, 64, 128, 256), (True, False)
SPECS = [QuantSpec(*choice) for choice in itertools.product(BITS, BLOCKS, SYMMETRIES)]


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ort_quantize(W: Tensor, spec: QuantSpec) -> QuantizedMatrix:
    """Quantize W (N, K) with ONNX Runtime's own quantizer."""
    N, K = W.shape
    blocks = -(-K // spec.block_size)
    codes = np.zeros((N, blocks, spec.block_size * spec.bits // 8), np.uint8)
    scales = np.zeros((N, blocks), np.float32)
    zero_points = np.zeros((N, -(-blocks * spec.bits // 8)), np.uint8)
    quantizer = getattr(_pybind_state, f"quantize_matmul_{spec.bits}bits")
    padded = np.pad(W.numpy().T, ((0, blocks * spec.block_size - K), (0, 0)))
    quantizer(codes, np.ascontiguousarray(padded), scales, zero_points, spec.block_size, N, K, spec.symmetric)
    return QuantizedMatrix(
        codes=torch.from_numpy(codes),
        scales=torch.from_numpy(scales),
        zero_points=None if spec.symmetric else torch.from_numpy(zero_points),
        columns=K,
        spec=spec,
    )


def matmul_nbits(matrix: QuantizedMatrix, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Return the matrix (N, K) that MatMulNBits multiplies by, read off with the identity."""
    K, N = matrix.columns, matrix.codes.shape[0]
    return run_node("MatMulNBits", np.eye(K, dtype=dtype), matrix, K=K, N=N, accuracy_level=0).T


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_bytes_are_those_of_onnx_runtimes_quantizer(spec: QuantSpec) -> None:
    W = random_matrix(24, 1024)
    ours, theirs = quantize_rtn(W, spec), ort_quantize(W, spec)
    assert torch.equal(ours.scales, theirs.scales)
    if not spec.symmetric:
        assert torch.equal(unpacked_zero_points(ours), unpacked_zero_points(theirs))
    if spec.bits == 8:
        # Theirs multiplies by the rounded reciprocal of the scale: 1 code in some 10,000 falls to the other side.
        difference = (unpacked_codes(ours).int() - unpacked_codes(theirs).int()).abs()
        assert int(difference.max()) <= 1
        assert float(difference.float().mean()) < 1e-3
    else:
        assert torch.equal(ours.codes, theirs.codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantization_of_onnx_runtimes_own_bytes(spec: QuantSpec) -> None:
    """A matrix that its quantizer packed means the same to us and to its kernel, columns beyond a block too."""
    for columns in (spec.block_size, 71, 2 * spec.block_size + 9):
        theirs = ort_quantize(random_matrix(5, columns), spec)
        np.testing.assert_array_equal(matmul_nbits(theirs), theirs.dequantize().numpy())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("columns", [256, 71])
def test_matmul_nbits_reads_our_matrix_bit_for_bit(spec: QuantSpec, columns: int) -> None:
    matrix = quantize_rtn(random_matrix(24, columns), spec)
    np.testing.assert_array_equal(matmul_nbits(matrix), matrix.dequantize().numpy())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("columns", [256, 71])
def test_gather_block_quantized_reads_our_table_bit_for_bit(spec: QuantSpec, columns: int) -> None:
    """Its rows are as long as the blocks they fill; what stands beyond the columns is for the graph to cut."""
    matrix = quantize_rtn(random_matrix(24, columns), spec)
    rows = run_node("GatherBlockQuantized", np.arange(24), matrix, gather_axis=0, quantize_axis=1)
    assert rows.shape[1] == -(-columns // spec.block_size) * spec.block_size
    np.testing.assert_array_equal(rows[:, :columns], matrix.dequantize().numpy())


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(4, 32, False), QuantSpec(8, 64)], ids=str)
def test_fp16_scales_round_before_the_codes_are_chosen(spec: QuantSpec) -> None:
    W = random_matrix(16, 128)
    matrix = quantize_rtn(W, spec, scale_dtype=torch.float16)
    assert matrix.scales.dtype == torch.float16
    np.testing.assert_allclose(matmul_nbits(matrix, np.float16), matrix.dequantize().numpy(), rtol=1e-3)
    step = matrix.scales.float().abs().repeat_interleave(spec.block_size, 1)
    slack = 1 + 2**-7 * (2**spec.bits)  # the rounded scale moves the far end of the range
    assert bool(((matrix.dequantize().float() - W).abs() <= step * slack).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_and_constant_blocks(spec: QuantSpec) -> None:
    W = torch.zeros(3, 2 * spec.block_size)
    W[1, : spec.block_size] = 0.75
    W[2, spec.block_size :] = -0.75
    matrix = quantize_rtn(W, spec)
    torch.testing.assert_close(matrix.dequantize(), W, rtol=1e-6, atol=0)
    assert torch.isfinite(matrix.scales).all()
    np.testing.assert_array_equal(matmul_nbits(matrix), matrix.dequantize().numpy())


def unpacked_codes(matrix: QuantizedMatrix) -> Tensor:
    return unpack_bits(matrix.codes, matrix.spec.bits, matrix.spec.block_size)


def unpacked_zero_points(matrix: QuantizedMatrix) -> Tensor:
    assert matrix.zero_points is not None
    return unpack_bits(matrix.zero_points, matrix.spec.bits, matrix.scales.shape[1])


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    rows=st.integers(1, 6),
    columns=st.integers(1, 300),
    magnitude=st.floats(1e-6, 1e6),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_at_most_half_a_step(
    spec: QuantSpec, rows: int, columns: int, magnitude: float, shift: float, seed: int
) -> None:
    W = (random_matrix(rows, columns, seed) + shift) * magnitude
    matrix = quantize_rtn(W, spec)
    step = matrix.scales.abs().repeat_interleave(spec.block_size, 1)[:, :columns]
    error = (matrix.dequantize() - W).abs()
    if spec.symmetric:
        # One code is short on the side opposite to the extreme value: beyond it values are clipped.
        top = -(2 ** (spec.bits - 1) - 0.5) * matrix.scales.repeat_interleave(spec.block_size, 1)[:, :columns]
        clipped = (W.abs() >= top.abs()) & (W.sign() == top.sign().neg())
        assert bool((error[clipped] <= step[clipped] * 1.0001).all())
        error, step = error[~clipped], step[~clipped]
    assert bool((error <= step * 0.5001).all())


@given(
    bits=st.sampled_from(BITS),
    values=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    rows=st.integers(1, 3),
)
def test_packing_round_trips_low_bits_first(bits: int, values: list[int], rows: int) -> None:
    codes = (torch.tensor([values] * rows) % 2**bits).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-len(values) * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, len(values)), codes)
    assert int(packed[0, 0]) % 2**bits == int(codes[0, 0])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_counted_bytes_are_the_stored_bytes(spec: QuantSpec) -> None:
    for scale_dtype in (torch.float32, torch.float16):
        matrix = quantize_rtn(random_matrix(7, 300), spec, scale_dtype=scale_dtype)
        tensors = [
            tensor for tensor in (matrix.codes, matrix.scales, matrix.zero_points) if tensor is not None
        ]
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert stored == quantized_bytes(7, 300, spec, scale_dtype.itemsize)


def test_dequantized_rows_are_independent() -> None:
    """An embedding dequantizes the rows it looks up only."""
    matrix = quantize_rtn(random_matrix(20, 50), QuantSpec(4, 16, symmetric=False))
    rows = torch.tensor([3, 3, 19])
    assert matrix.zero_points is not None
    some = dequantize(matrix.codes[rows], matrix.scales[rows], matrix.zero_points[rows], 50, matrix.spec)
    assert torch.equal(some, matrix.dequantize()[rows])
