"""The emulation of accuracy level 4 predicts the error of ONNX Runtime's own kernels, outliers included."""

from __future__ import annotations

import itertools
import platform

import pytest
import torch
from ort_nodes import run_node
from torch import Tensor, nn

from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.passes.modules.quantized import QuantizedLinear, float_inputs, level4_inputs
from rk_export.passes.numerics.int8_inputs import has_int8_kernel, int8_inputs
from rk_export.passes.numerics.quantize import QuantizedMatrix, quantize_rtn

SPECS = [QuantSpec(*choice) for choice in itertools.product((2, 4, 8), (16, 32, 128), (True, False))]
x86_64 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="other kernels round otherwise"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at_level(x: Tensor, matrix: QuantizedMatrix, level: int) -> Tensor:
    K, N = matrix.columns, matrix.codes.shape[0]
    return torch.from_numpy(run_node("MatMulNBits", x.numpy(), matrix, K=K, N=N, accuracy_level=level))


@x86_64
@pytest.mark.parametrize("outlier", [1, 1000], ids=["even", "outlier"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_error_of_onnx_runtime_is_predicted(spec: QuantSpec, outlier: float) -> None:
    for rows, columns in ((1, 256), (7, 300), (40, 72)):
        matrix = quantize_rtn(random(33, columns), spec)
        x = random(rows, columns, seed=1)
        x[:, 5] *= outlier
        exact = at_level(x, matrix, 0)
        runtime = at_level(x, matrix, 4) - exact
        emulated = int8_inputs(x, spec) @ matrix.dequantize().T - x @ matrix.dequantize().T
        rounding = 1e-6 * float(exact.abs().max())
        if not has_int8_kernel(spec):
            assert float(runtime.abs().max()) < rounding
            assert int8_inputs(x, spec) is x
            continue
        assert float(runtime.abs().max()) > 100 * rounding
        # A tie may fall to the other side; the size of the error stays.
        assert float((runtime - emulated).norm()) < 0.1 * float(runtime.norm())
        assert float(runtime.norm()) == pytest.approx(float(emulated.norm()), rel=0.02)


def test_each_block_has_a_scale_of_its_own() -> None:
    x = torch.ones(1, 64)
    x[0, 0], x[0, 1] = 1e6, 0.4
    rounded = int8_inputs(x, QuantSpec(4, 32))
    assert rounded[0, 0] == pytest.approx(1e6)
    assert (rounded[0, 1:32] == 0).all()
    torch.testing.assert_close(rounded[0, 32:], x[0, 32:])


def test_blocks_of_zeros_and_half_floats() -> None:
    x = torch.zeros(2, 3, 40, dtype=torch.float16)
    x[..., -1] = 3
    rounded = int8_inputs(x, QuantSpec(8, 32))
    assert torch.equal(rounded, x)
    assert rounded.dtype is torch.float16


def test_matrices_without_blocks_are_not_concerned() -> None:
    assert not has_int8_kernel(W8A8)


def test_a_model_rounds_its_inputs_within_the_context_alone() -> None:
    spec = QuantSpec(4, 32)
    linear = QuantizedLinear(quantize_rtn(random(8, 64), spec))
    model, x = nn.Sequential(linear), random(3, 64, seed=1)
    exact = model(x)
    with level4_inputs(model), float_inputs(model):
        assert torch.equal(model(x), int8_inputs(x, spec) @ linear.weight.T)
    assert torch.equal(model(x), exact)
