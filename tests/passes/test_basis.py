"""Basis selection, the tensor part: directions, schedule, importances, the common fraction, and the module."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from rk_export.methods.basel.modules import BasisLinear
from rk_export.passes.numerics.basis import (
    MEMORY,
    PairSize,
    common_fraction,
    directions,
    drop_steps,
    folded,
    geometric,
    kept,
    parameters,
    second_order,
    thresholds,
)
from rk_export.passes.numerics.joint_svd import joint_factors

GENERATOR = torch.Generator()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR.manual_seed(seed), dtype=torch.float64)


def linear(out: int = 12, inner: int = 20, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    module = nn.Linear(inner, out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(random(out, inner, seed=seed))
        if bias:
            module.bias.copy_(random(out, seed=seed + 1))
    return module


def basis(module: nn.Linear, new_basis: int = 3) -> BasisLinear:
    return BasisLinear(module, new_basis, torch.Generator().manual_seed(5), torch.float32)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_directions_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    W = random(*shape)
    found = directions(W)
    assert torch.allclose(found.values, torch.linalg.svdvals(W), rtol=1e-10)
    assert torch.allclose((found.left * found.values) @ found.right, W, atol=1e-12)
    identity = torch.eye(min(shape), dtype=torch.float64)
    assert torch.allclose(found.left.T @ found.left, identity, atol=1e-8)
    assert torch.allclose(found.right @ found.right.T, identity, atol=1e-10)


def test_directions_of_a_deficient_matrix_are_finite() -> None:
    W = random(8, 2) @ random(2, 10, seed=1)
    found = directions(W)
    assert torch.allclose((found.left * found.values) @ found.right, W, atol=1e-12)
    assert torch.isfinite(found.left).all()
    assert torch.equal(directions(torch.zeros(4, 5)).left, torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("steps", "events", "expected"),
    [
        (8, 3, (2, 4, 6)),
        (8, 1, (6,)),
        (20, 4, (4, 8, 12, 15)),
        (4, 100, (1, 2, 3)),
        (1, 5, (1,)),
    ],
)
def test_directions_are_dropped_in_the_first_three_quarters(
    steps: int, events: int, expected: tuple[int, ...]
) -> None:
    assert drop_steps(steps, events) == expected


def test_a_long_schedule_is_even() -> None:
    places = drop_steps(1000, 100)
    assert len(places) == 100
    assert places[-1] == 750
    assert {after - before for before, after in itertools.pairwise(places)} == {7, 8}


def test_the_schedule_falls_by_equal_ratios() -> None:
    values = [geometric(1.6, 0.4, step / 4) for step in range(5)]
    assert values == pytest.approx([1.6, 1.6 / 2**0.5, 0.8, 0.8 / 2**0.5, 0.4])


def test_the_largest_importances_that_reach_the_fraction_are_kept() -> None:
    importance = torch.tensor([1.0, 4.0, 0.0, 3.0, 2.0])  # shares before: 0.9, 0, 1, 0.4, 0.7
    needed = thresholds(importance)
    assert torch.allclose(needed, torch.tensor([0.9, 0.0, 1.0, 0.4, 0.7], dtype=torch.float64))
    for fraction, expected in [(0.0, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.95, [0, 1, 3, 4])]:
        index = kept(needed, fraction)
        assert index.tolist() == expected
        assert fraction <= float(importance[index].sum()) / 10 + 1e-12


def test_what_was_dropped_before_counts() -> None:
    """Two events in a row keep what one event would: fractions are of the importance at the beginning."""
    importance = random(30).abs()
    once = kept(thresholds(importance), 0.5)
    first = kept(thresholds(importance), 0.8)
    held = float(importance[first].sum() / importance.sum())
    second = first[kept(thresholds(importance[first], held), 0.5)]
    assert torch.equal(once, second)
    assert len(once) < len(first) < 30


def test_without_any_importance_one_direction_stays() -> None:
    assert kept(thresholds(torch.zeros(4)), 0.999).tolist() == [0]


@pytest.mark.parametrize("stored", [False, True], ids=["pairs", "stored"])
def test_the_common_fraction_is_the_largest_that_fits(stored: bool) -> None:
    sizes = [PairSize(12, 20, 2), PairSize(30, 10, 2), PairSize(16, 16, 2)]
    needed = [
        thresholds(random(min(size.rows, size.columns), seed=seed).abs()) for seed, size in enumerate(sizes)
    ]
    dense = sum(size.dense for size in sizes)
    candidates = sorted({float(value) for item in needed for value in item} | {1.0})
    for allowed in (int(0.55 * dense), int(0.7 * dense), int(0.9 * dense)):
        fraction = common_fraction(needed, sizes, allowed, stored=stored)
        assert parameters(needed, sizes, fraction, stored=stored) <= allowed
        above = next(value for value in candidates if value > fraction)
        assert parameters(needed, sizes, above, stored=stored) > allowed
    assert common_fraction(needed, sizes, 10**6, stored=stored) == 1.0


def test_a_pair_beyond_break_even_is_counted_as_the_dense_matrix() -> None:
    size = PairSize(10, 30, 2)  # break-even at 7.5
    assert [size.stored(k) for k in (1, 5, 6, 10)] == [120, 280, 300, 300]
    assert size.pair(6) == 320


def test_second_order_is_the_rise_of_a_quadratic_loss() -> None:
    """Each token draws its loss ½ (a - s)² around s = 1; without the coefficient the mean loss rises by ½ s²."""
    tokens, steps = 512, 200
    noise = random(steps, tokens)
    gradients = noise.mean(1)[:, None]  # of the mean loss by s, which is 1
    first = second = torch.zeros(1, dtype=torch.float64)
    for gradient in gradients:
        first, second = MEMORY * first + gradient, MEMORY * second + gradient.square()
    assert float(second_order(first, second, steps, tokens)) == pytest.approx(0.5, rel=0.3)


def test_second_order_counts_a_slope_that_stands_out() -> None:
    steps, tokens = 40, 100
    weight = (1 - MEMORY**steps) / (1 - MEMORY)
    noise = 0.01
    for mean in (0.05, 0.0, -0.05):
        first = torch.tensor([mean * weight], dtype=torch.float64)
        second = torch.tensor([(mean**2 + noise**2) * weight], dtype=torch.float64)
        rise = float(second_order(first, second, steps, tokens))
        plain = 0.5 * tokens * noise**2
        if mean > 0:  # a positive slope: the loss falls on the way to zero
            assert rise == 0
        elif mean < 0:
            assert plain + 0.04 < rise < plain + 0.06
        else:
            assert rise == pytest.approx(plain, rel=0.05)


def test_a_new_module_is_the_layer_and_its_bias_stays() -> None:
    dense = linear()
    x = random(4, 20, seed=3)
    module = basis(dense)
    assert torch.allclose(module(x), dense(x), atol=1e-12)
    assert set(module.trained()) == {"coefficients", "left_add", "right_add", "bias"}
    assert float(module.left_add.detach().abs().max()) == 0
    assert float(module.right_add.detach().std()) == pytest.approx(3**-0.5, rel=0.3)


@pytest.mark.parametrize("new_basis", [0, 3])
@pytest.mark.parametrize("thawed", [False, True])
def test_gradients_are_those_of_the_formula(new_basis: int, thawed: bool) -> None:
    module = basis(linear(6, 8), new_basis)
    with torch.no_grad():
        module.left_add.copy_(random(6, new_basis, seed=4))
    if thawed:
        module.thaw()
    x = random(5, 8, seed=3).requires_grad_(True)
    names, tensors = zip(*module.trained().items(), strict=True)
    if new_basis == 0:  # no entries, no numeric gradient
        pairs = [(name, item) for name, item in zip(names, tensors, strict=True) if item.numel()]
        names, tensors = zip(*pairs, strict=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        return result

    assert ({"left", "right"} <= set(names)) == thawed
    assert torch.autograd.gradcheck(output, (x, *tensors))


def test_dropping_removes_exactly_the_others() -> None:
    module = basis(linear(bias=False))
    with torch.no_grad():
        module.left_add.copy_(random(12, 3, seed=4))
        module.coefficients.mul_(1.1)
    index = torch.tensor([0, 2, 5])
    values = module.coefficients.detach().square()
    expected = (module.left[:, index] * values[index]) @ module.right[
        index
    ] + module.left_add @ module.right_add
    x = random(4, 20, seed=3)
    module.keep(index)
    module.keep(torch.tensor([0, 1, 2]))
    assert module.kept.tolist() == [0, 2, 5]
    assert torch.allclose(module(x), x @ expected.detach().T, atol=1e-12)
    module.keep(torch.tensor([1]))
    assert module.kept.tolist() == [2]
    assert module.first.shape == module.second.shape == module.absolute.shape == (1,)


def test_a_folded_pair_is_exact_at_the_rank_of_both_parts() -> None:
    """The second SVD of W' at rank k + r loses nothing: its rank is no larger."""
    module = basis(linear(16, 24))
    module.keep(torch.tensor([0, 1, 4, 7]))
    with torch.no_grad():
        module.left_add.copy_(random(16, 3, seed=4))
    W = module.folded()
    x = random(5, 24, seed=6)
    assert torch.allclose(module(x), x @ W.T + module.bias, atol=1e-12)
    assert int(torch.linalg.matrix_rank(W)) == 7
    factors = joint_factors(W, 7)
    assert torch.allclose(factors.up @ factors.down, W, atol=1e-12)
    assert factors.weighted_error < 1e-7
    assert joint_factors(W, 6).weighted_error > 1e-3


def test_folding_adds_both_parts() -> None:
    left, values, right, left_add, right_add = (
        random(*shape, seed=seed) for seed, shape in enumerate([(5, 2), (2,), (2, 4), (5, 1), (1, 4)])
    )
    expected = left @ torch.diag(values) @ right + left_add @ right_add
    assert torch.allclose(folded(left, values, right, left_add, right_add), expected, atol=1e-14)


def test_evidence_is_coefficient_times_gradient() -> None:
    module = basis(linear())
    x = random(4, 20, seed=3)
    s = module.coefficients.detach().square().requires_grad_(True)
    dense = (module.left.detach() * s) @ module.right.detach()
    (by_s,) = torch.autograd.grad((x @ dense.T).square().sum(), s)
    with torch.no_grad():
        module.bias.zero_()
    for _ in range(2):
        module.zero_grad()
        module(x).square().sum().backward()
        module.observe()
    change = (s * by_s).detach()
    assert torch.allclose(module.first, (1 + MEMORY) * change, rtol=1e-9)
    assert torch.allclose(module.second, (1 + MEMORY) * change.square(), rtol=1e-9)
    assert torch.allclose(module.absolute, (1 + MEMORY) * change.abs(), rtol=1e-9)


def test_bf16_products_come_close() -> None:
    dense = linear().float()
    module = BasisLinear(dense, 3, torch.Generator().manual_seed(5), torch.bfloat16)
    x = random(4, 20, seed=3).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert torch.allclose(y.float(), dense(x), atol=0.1)
    assert module.left.dtype == torch.float32
