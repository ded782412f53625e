"""Int8 matrices with int8 inputs: arithmetic, module, pass, and the plans that are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compressed import SourceOf, compress, floats
from made_recipes import made_recipe
from torch import Tensor, nn

from rk_export.errors import InputError
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.passes.base import Layer, run_weight_pass
from rk_export.passes.modules.quantized import Int8Linear, float_inputs
from rk_export.passes.numerics.int8 import int8_bytes, int8_product, quantize_rows, token_codes
from rk_export.passes.weights.factorize import Factorize
from rk_export.passes.weights.int8 import Int8
from rk_export.passes.weights.quantize import Quantize, matrix_paths
from rk_export.plan import Plan, SitePlan
from rk_export.planning.planner import check_plan, decide_plan
from rk_export.rewrite.sizes import kept_parameters, planned_findings
from rk_export.source.stored import StoredModel

CPU = torch.device("cpu")
RANK_8 = RankRule("rank", 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_are_rounded_to_half_a_step_and_their_extremes_kept() -> None:
    W = random(7, 40) * torch.logspace(-6, 3, 7)[:, None]
    matrix = quantize_rows(W)
    assert matrix.codes.dtype == torch.int8
    assert torch.equal(matrix.codes.abs().amax(1), torch.full((7,), 127, dtype=torch.int8))
    assert ((matrix.dequantize() - W).abs() <= 0.5001 * matrix.scales[:, None]).all()


def test_rows_and_tokens_of_zeros_stay_zero() -> None:
    W = random(3, 8)
    W[1] = 0
    matrix = quantize_rows(W)
    x = torch.stack([random(8, seed=1), torch.zeros(8)])
    y = int8_product(x, matrix.codes, matrix.scales)
    assert torch.isfinite(y).all()
    assert (y[:, 1] == 0).all()
    assert (y[1] == 0).all()


def test_products_sum_integers_exactly() -> None:
    matrix, x = quantize_rows(random(9, 600)), random(5, 600, seed=1)
    codes, peaks = token_codes(x)
    assert float(codes.abs().max()) == 127
    assert torch.equal(codes, codes.round())
    sums = codes.numpy().astype(np.int64) @ matrix.codes.numpy().astype(np.int64).T
    expected = sums * (matrix.scales.double().numpy() / 127) * peaks.double().numpy()
    found = int8_product(x, matrix.codes, matrix.scales).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)


def test_a_token_does_not_feel_its_neighbours() -> None:
    """One scale for all tokens would lose the ordinary ones beside one of thousands."""
    W, x = random(16, 64), random(6, 64, seed=1)
    x[0, 3] = 3184.0
    matrix = quantize_rows(W)
    together = int8_product(x, matrix.codes, matrix.scales)
    alone = torch.cat([int8_product(token[None], matrix.codes, matrix.scales) for token in x])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    exact = x.double() @ W.double().T
    errors = (together - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(errors[1:].max()) < 0.03
    one_scale = (x / 3184 * 127).round() * 3184 / 127
    assert float((one_scale[1:].double() @ W.double().T - exact[1:]).norm() / exact[1:].norm()) > 0.9


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_module_rounds_its_inputs_or_not(has_bias: bool) -> None:
    matrix, x = quantize_rows(random(5, 32)), random(2, 3, 32, seed=1)
    bias = random(5, seed=2) if has_bias else None
    linear = Int8Linear(matrix, bias)
    rounded = int8_product(x, matrix.codes, matrix.scales) + (0 if bias is None else bias)
    exact = nn.functional.linear(x, matrix.dequantize(), bias)
    torch.testing.assert_close(linear(x), rounded)
    with float_inputs(nn.Sequential(linear)):
        torch.testing.assert_close(linear(x), exact)
    assert torch.equal(linear(x), rounded)
    assert 0 < float((rounded - exact).abs().max()) < 0.1


def test_gradients_pass_as_though_inputs_were_not_rounded() -> None:
    linear, x = Int8Linear(quantize_rows(random(5, 32))), random(4, 32, seed=1).requires_grad_()
    (found,) = torch.autograd.grad(linear(x).square().sum(), x)
    expected = 2 * linear(x).detach() @ linear.weight
    torch.testing.assert_close(found, expected)
    assert torch.equal(linear(x.detach()), int8_product(x.detach(), linear.codes, linear.scales))


def test_an_empty_module_takes_the_state_of_a_filled_one() -> None:
    for bias in (random(5), None):
        filled = Int8Linear(quantize_rows(random(5, 32)), bias)
        empty = Int8Linear.empty(5, 32, bias=bias is not None)
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        empty.load_state_dict(filled.state_dict(), assign=True)
        assert torch.equal(empty(random(2, 32)), filled(random(2, 32)))


@pytest.mark.parametrize("form", ["dense", "joint", "per_head"])
def test_every_matrix_of_a_site_is_rounded_and_counted(form: str) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.q_proj, module.k_proj = nn.Linear(48, 32), nn.Linear(48, 16)
    layer = Layer(0, module, kv_groups=2)
    rank = 0 if form == "dense" else 8
    site = SitePlan("layers.0.qk", 0, ("q", "k"), ("q_proj", "k_proj"), form, rank, W8A8)  # type: ignore[arg-type]
    run_weight_pass(Factorize("balanced", CPU), layer, [site], {})
    before = {
        name: part.weight.detach().clone()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }
    assert not run_weight_pass(Quantize(torch.float32, CPU), layer, [site], {})
    (finding,) = run_weight_pass(Int8(CPU), layer, [site], {})

    after = {name: part for name, part in module.named_modules() if isinstance(part, Int8Linear)}
    assert after.keys() == before.keys() == set(matrix_paths(layer, site))
    difference = torch.cat([(after[name].weight - before[name]).flatten() for name in before])
    norm = torch.cat([weight.flatten() for weight in before.values()]).norm()
    assert finding.error == pytest.approx(float(difference.norm() / norm), rel=1e-5)
    assert finding.bytes_after == sum(int8_bytes(*part.codes.shape) for part in after.values())
    stored = [tensor for name, tensor in module.state_dict().items() if not name.endswith("bias")]
    assert finding.bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert finding.details == {"pass": "int8", "bits": 8, "activations": 8}


def test_weight_only_sites_are_left_alone() -> None:
    site = SitePlan("layers.0.q", 0, ("q",), ("q_proj",), "dense", 0, QuantSpec(8, 32))
    assert not Int8(CPU).applies(site)
    assert Quantize(torch.float32, CPU).applies(site)
    assert not Int8(CPU).applies(replace(site, quant=None))


def test_sizes_are_known_before_the_work(source_of: SourceOf) -> None:
    source = source_of("qwen2")
    options = floats(("qk",), rank=RANK_8, quant=W8A8)
    planned = {finding.target: finding for finding in planned_findings(source, decide_plan(source, options))}
    rewritten = compress(source, options)
    done = [finding for finding in rewritten.findings if (finding.details or {}).get("pass") == "int8"]
    assert len(done) == 2 * 6
    for finding in done:
        assert planned[finding.target].bytes_after == finding.bytes_after
        assert (planned[finding.target].details or {}).get("activations") == 8
    assert kept_parameters(rewritten.model) < source.parameter_count()


def int8_plan(source: StoredModel) -> Plan:
    return decide_plan(source, floats(quant=W8A8))


@pytest.mark.parametrize("ep", ["cuda", "portable"])
def test_only_the_cpu_graph_has_int8_inputs(source_of: SourceOf, ep: str) -> None:
    with pytest.raises(InputError, match="int8 inputs"):
        made_recipe(quant=W8A8, ep=ep)
    plan = int8_plan(source_of("llama"))
    edited = replace(plan, recipe=floats(ep=ep))
    with pytest.raises(InputError, match="int8 inputs"):
        check_plan(source_of("llama"), edited)


def test_what_has_no_int8_form_is_refused(source_of: SourceOf) -> None:
    with pytest.raises(InputError, match="embed_tokens has no inputs"):
        made_recipe(table=W8A8)
    plan = int8_plan(source_of("llama"))
    sites = (replace(plan.sites[0], correction=4), *plan.sites[1:])
    with pytest.raises(InputError, match="only weight-only quantization is corrected"):
        check_plan(source_of("llama"), replace(plan, sites=sites))
