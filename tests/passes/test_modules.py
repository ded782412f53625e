"""Factor pairs and quantized matrices as PyTorch modules: values, sharing, state dicts, meta copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rk_export.options.quantization import QuantSpec
from rk_export.passes.modules import quantized
from rk_export.passes.modules.factors import GroupedFactors, JointFactors, JointMember
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear, empty_matrix
from rk_export.passes.numerics.quantize import quantize_rtn

SPECS = [
    QuantSpec(4, 16),
    QuantSpec(4, 16, symmetric=False),
    QuantSpec(8, 64),
    QuantSpec(2, 32, symmetric=False),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def joint_pair(out: dict[str, int], rank: int = 3, columns: int = 8, seed: int = 0) -> JointFactors:
    torch.manual_seed(seed)
    return JointFactors(
        nn.Linear(columns, rank, bias=False), {role: nn.Linear(rank, size) for role, size in out.items()}
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_quantized_linear_multiplies_by_its_dequantized_weight(spec: QuantSpec, has_bias: bool) -> None:
    matrix, x = quantize_rtn(random(5, 70), spec), random(2, 3, 70, seed=1)
    bias = random(5, seed=2) if has_bias else None
    linear = QuantizedLinear(matrix, bias)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, matrix.dequantize(), bias))
    assert (linear.in_features, linear.out_features) == (70, 5)
    assert linear(x.to(torch.bfloat16) if bias is None else x).dtype == (
        torch.bfloat16 if bias is None else x.dtype
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantized_embedding_looks_rows_up(spec: QuantSpec) -> None:
    matrix = quantize_rtn(random(11, 70), spec)
    ids = torch.tensor([[0, 10, 3], [3, 3, 1]])
    torch.testing.assert_close(QuantizedEmbedding(matrix, 2.5)(ids), matrix.dequantize()[ids] * 2.5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_empty_modules_take_the_state_of_filled_ones(spec: QuantSpec) -> None:
    matrix = quantize_rtn(random(5, 70), spec)
    for filled, empty in (
        (QuantizedLinear(matrix, random(5)), QuantizedLinear.empty(5, 70, spec, bias=True)),
        (QuantizedLinear(matrix), QuantizedLinear.empty(5, 70, spec, bias=False)),
        (QuantizedEmbedding(matrix), QuantizedEmbedding.empty(5, 70, spec)),
    ):
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in filled.state_dict().items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        empty.load_state_dict(filled.state_dict(), assign=True)
        assert torch.equal(empty.weight, filled.weight)


def test_an_empty_matrix_has_the_shapes_of_a_packed_one() -> None:
    for spec in SPECS:
        packed, empty = quantize_rtn(random(9, 70), spec), empty_matrix(9, 70, spec)
        assert empty.codes.shape == packed.codes.shape
        assert empty.scales.shape == packed.scales.shape
        assert (empty.zero_points is None) == (packed.zero_points is None)
        if empty.zero_points is not None and packed.zero_points is not None:
            assert empty.zero_points.shape == packed.zero_points.shape


def test_joint_members_multiply_by_their_product() -> None:
    pair, x = joint_pair({"q": 6, "k": 4}), random(2, 8)
    for role, size in (("q", 6), ("k", 4)):
        up = pair.ups[role]
        assert isinstance(up, nn.Linear)
        assert isinstance(pair.down, nn.Linear)
        expected = nn.functional.linear(x, up.weight @ pair.down.weight, up.bias)
        member = JointMember(pair, role)
        torch.testing.assert_close(member(x), expected)
        assert member(x).shape == (2, size)
    assert list(pair.pairs()) == [pair]


def test_grouped_factors_put_the_groups_side_by_side_in_order() -> None:
    pairs, x = [joint_pair({"q": 6, "k": 2}, seed=seed) for seed in range(3)], random(2, 5, 8)
    grouped = GroupedFactors(pairs)
    expected = torch.cat([pair.member("q", x) for pair in pairs], dim=-1)
    assert expected.shape == (2, 5, 18)
    assert torch.equal(JointMember(grouped, "q")(x), expected)
    assert list(grouped.pairs()) == pairs


def test_members_own_no_tensors() -> None:
    parent = nn.Module()
    parent.factors = joint_pair({"q": 6, "k": 4})
    parent.q_proj, parent.k_proj = (JointMember(parent.factors, role) for role in ("q", "k"))
    assert all(name.startswith("factors.") for name in parent.state_dict())
    assert parent.q_proj.factors is parent.k_proj.factors is parent.factors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_large_matrix_is_multiplied_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, has_bias: bool
) -> None:
    """Forward bit for bit; gradients are sums in another order."""
    linear = QuantizedLinear(
        quantize_rtn(random(300, 64), QuantSpec(4, 16, symmetric=symmetric)),
        random(300, seed=2) if has_bias else None,
    )
    x, upstream = random(2, 5, 64, seed=1).requires_grad_(), random(2, 5, 300, seed=3)
    whole = linear(x)
    (expected,) = torch.autograd.grad(whole, x, upstream)
    rows: list[int] = []
    dequantize = quantized.dequantize

    def counted(codes: Tensor, *args: object) -> Tensor:
        rows.append(len(codes))
        return dequantize(codes, *args)

    monkeypatch.setattr(quantized, "dequantize", counted)
    monkeypatch.setattr(quantized, "TOGETHER", 128 * 64)
    assert torch.equal(linear(x), whole)
    assert rows == [128, 128, 44]
    (found,) = torch.autograd.grad(linear(x), x, upstream)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(linear(x), whole)
    assert max(rows) == 128
