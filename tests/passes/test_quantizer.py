"""Quantizers inside the pass: what they weigh, how factors are refitted, and what is said when nothing is known."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rk_export.options.quantization import QuantSpec
from rk_export.passes.base import Layer, run_weight_pass
from rk_export.passes.modules.quantized import QuantizedLinear
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.gauge import balanced_gauge, mixed_gauge
from rk_export.passes.weights.factorize import Factorize
from rk_export.passes.weights.quantize import NO_STATISTICS, Quantize
from rk_export.passes.weights.quantizer import Quantizer, QuantizerName
from rk_export.plan import SitePlan
from rk_export.report.records import Finding

CPU = torch.device("cpu")
INT4 = QuantSpec(4, 16)
FORMS = ("dense", "joint", "per_head", "identity")
QUANTIZERS: tuple[QuantizerName, ...] = ("rtn", "search", "gptq")


def inputs(tokens: int = 600, columns: int = 64) -> Tensor:
    """Correlated inputs of unequal sizes."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    return torch.randn(tokens, columns, generator=generator) @ mix * torch.linspace(0.2, 3, columns)


def site(form: Any, spec: QuantSpec = INT4, rank: int = 16) -> SitePlan:
    rank = 0 if form == "dense" else rank
    return SitePlan("layers.0.qk", 0, ("q", "k"), ("q_proj", "k_proj"), form, rank, spec)


def layer_of(plan: SitePlan, statistics: dict[str, Curvature]) -> Layer:
    """Return a layer whose site is factorized as planned."""
    torch.manual_seed(0)
    module = nn.Module()
    module.q_proj, module.k_proj = nn.Linear(64, 48), nn.Linear(64, 32)
    layer = Layer(0, module, kv_groups=2)
    run_weight_pass(Factorize("orthogonal", CPU), layer, [plan], statistics)
    return layer


def statistics_of(second: Tensor, cross: Tensor | None = None) -> dict[str, Curvature]:
    return {"layers.0.qk": Curvature(Inputs(second, cross))}


def outputs(layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([layer.module.q_proj(x), layer.module.k_proj(x)], dim=-1)


def quantized(
    layer: Layer, plan: SitePlan, name: QuantizerName, statistics: dict[str, Curvature]
) -> tuple[Layer, Finding]:
    copy = Layer(0, deepcopy(layer.module), layer.kv_groups)
    # A copied member still reads the factors of the original.
    if plan.form != "dense":
        for path in plan.paths:
            copy.module.get_submodule(path)._factors = (copy.module.qk_factors,)
    (finding,) = run_weight_pass(Quantize(torch.float16, CPU, name), copy, [plan], statistics)
    return copy, finding


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", [INT4, QuantSpec(2, 16, False)], ids=str)
def test_each_quantizer_keeps_the_outputs_better_than_the_one_before(form: str, spec: QuantSpec) -> None:
    x = inputs()
    plan, statistics = site(form, spec), statistics_of(x.T @ x / len(x))
    layer = layer_of(plan, statistics)
    expected = outputs(layer, x)
    errors = []
    for name in QUANTIZERS:
        copy, finding = quantized(layer, plan, name, statistics)
        errors.append(float((outputs(copy, x) - expected).norm()))
        assert finding.details is not None
        assert finding.details["quantizer"] == name
        assert not finding.reason
        bias = outputs(layer, x[:1] * 0)
        relative = errors[-1] / float((expected - bias).norm())
        assert finding.details["weighted_error"] == pytest.approx(relative, rel=1e-2)
        matrices = [module for module in copy.module.modules() if isinstance(module, QuantizedLinear)]
        assert all(module.scales.dtype is torch.float16 for module in matrices)
        assert not any(isinstance(module, nn.Linear) for module in copy.module.modules())
    assert errors[1] < errors[0]
    assert errors[2] < 0.8 * errors[0]


@pytest.mark.parametrize("form", ["joint", "identity"])
def test_the_second_factor_is_refitted_to_the_quantized_first_one(form: str) -> None:
    """Against the same quantizer on both factors as they are."""
    x = inputs()
    plan, statistics = site(form, rank=48), statistics_of(x.T @ x / len(x))
    layer = layer_of(plan, statistics)
    expected = outputs(layer, x)
    refitted, _ = quantized(layer, plan, "gptq", statistics)
    apart = Layer(0, deepcopy(layer.module), layer.kv_groups)
    factors = apart.module.qk_factors
    for path in plan.paths:
        apart.module.get_submodule(path)._factors = (factors,)
    quantizer, known = Quantizer("gptq", torch.float16), Inputs(x.T @ x / len(x))
    with torch.no_grad():
        factors.down = QuantizedLinear(quantizer.quantize(factors.down.weight, INT4, known))
        behind = known.behind(factors.down.weight)
        for role, up in list(factors.ups.items()):
            factors.ups[role] = QuantizedLinear(quantizer.quantize(up.weight, INT4, behind), up.bias)
    error, naive = ((outputs(each, x) - expected).norm() for each in (refitted, apart))
    assert float(error) < 0.92 * float(naive)


@pytest.mark.parametrize("change", [balanced_gauge, mixed_gauge])
def test_a_gauge_leaves_the_product(change: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(30, 12, generator=generator), torch.randn(12, 40, generator=generator)
    B[:, 3], A[5] = 0, 0
    up, down = change(B * torch.logspace(-3, 3, 12), A)
    torch.testing.assert_close(up @ down, B * torch.logspace(-3, 3, 12) @ A, rtol=1e-4, atol=1e-2)
    if change is mixed_gauge:
        up = mixed_gauge(B, A, seed=1)[0]
        assert not torch.equal(up, mixed_gauge(B, A, seed=2)[0])
        assert torch.equal(up, mixed_gauge(B, A, seed=1)[0])


@pytest.mark.parametrize(("form", "known"), list(itertools.product(FORMS, ("nothing", "diagonal"))))
def test_without_correlations_gptq_says_that_it_searched(form: str, known: str) -> None:
    plan = site(form)
    second = inputs().square().mean(0)
    statistics = statistics_of(second) if known == "diagonal" else {}
    layer = layer_of(plan, statistics)
    copy, finding = quantized(layer, plan, "gptq", statistics)
    searched, other = quantized(layer, plan, "search", statistics)
    assert finding.reason == NO_STATISTICS
    assert finding.details is not None
    assert finding.details["quantizer"] == "search"
    assert ("weighted_error" in finding.details) is (known == "diagonal")
    assert not other.reason
    for name, tensor in searched.module.state_dict().items():
        assert torch.equal(tensor, copy.module.state_dict()[name])


@pytest.mark.parametrize("name", QUANTIZERS[1:])
def test_a_dense_matrix_aims_at_the_outputs_of_the_dense_model(name: QuantizerName) -> None:
    """Inputs that the layers before have changed: the cross moment tells how."""
    before = inputs()
    change = torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    x = before @ change
    second, cross = x.T @ x / len(x), before.T @ x / len(x)
    plan = site("dense", QuantSpec(4, 32))
    layer = layer_of(plan, {})
    expected = outputs(layer, before)
    without, _ = quantized(layer, plan, name, statistics_of(second))
    aimed, _ = quantized(layer, plan, name, statistics_of(second, cross))
    assert float((outputs(aimed, x) - expected).norm()) < 0.5 * float((outputs(without, x) - expected).norm())
