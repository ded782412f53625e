"""The pass that factorizes on tiny models: full rank changes nothing, the reported error is the measured one."""

from __future__ import annotations

import pytest
import torch
from compressed import SourceOf, compress, floats, full_rank_plan, logits, tokens
from torch import nn

from rk_export.options.ranks import Gauge, RankRule
from rk_export.passes.base import Layer
from rk_export.passes.modules.factors import GroupedFactors, JointFactors, JointMember
from rk_export.passes.weights.factorize import Factorize, empty_factors
from rk_export.plan import SitePlan
from rk_export.report.records import Outcome
from rk_export.rewrite.apply import rewrite

PER_HEAD = ("qk", "per-head")
FULL_RANK = [
    *(
        ("llama", group, "whole")
        for group in ("qk", "qkv", "gate_up", "q", "k", "v", "o", "gate", "up", "down")
    ),
    *(("llama", *PER_HEAD), ("qwen2", *PER_HEAD), ("qwen2", "qkv", "whole")),
    *(("qwen3", *PER_HEAD), ("qwen3", "qk", "whole"), ("gemma3", *PER_HEAD), ("olmo2", *PER_HEAD)),
    *(("phi3", *PER_HEAD), ("phi3", "qkv", "whole"), ("phi3", "gate_up", "whole")),
    *(("gpt2", *PER_HEAD), ("gpt2", "qkv", "whole"), ("gpt2", "up", "whole"), ("gpt2", "down", "whole")),
    *(("opt", "qk", "whole"), ("starcoder2", "qkv", "whole"), ("bert", *PER_HEAD), ("bert", "qk", "whole")),
    *(("mixtral", *PER_HEAD), ("qwen3_moe", "qkv", "whole")),
]


@pytest.mark.parametrize(("family", "group", "qk"), FULL_RANK)
def test_full_rank_reproduces_the_dense_logits(source_of: SourceOf, family: str, group: str, qk: str) -> None:
    source = source_of(family)
    ids = tokens(source)
    expected = logits(source.load(), ids)
    rewritten = rewrite(source, full_rank_plan(source, group, qk))
    assert any(isinstance(module, JointMember) for module in rewritten.model.modules())
    assert float((logits(rewritten.model, ids) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    applied = [finding for finding in rewritten.findings if finding.outcome is Outcome.APPLIED]
    assert len(applied) == source.layer_count
    assert max(finding.error or 0.0 for finding in applied) < 1e-3


def dense_layer(rows: dict[str, int], columns: int, kv_groups: int) -> tuple[Layer, SitePlan]:
    torch.manual_seed(0)
    module = nn.Module()
    for role, size in rows.items():
        module.add_module(f"{role}_proj", nn.Linear(columns, size))
    plan = SitePlan(
        "layers.7.qk", 7, tuple(rows), tuple(f"{role}_proj" for role in rows), "joint", 5, quant=None
    )
    return Layer(7, module, kv_groups), plan


def product(factors: JointFactors | GroupedFactors, role: str) -> torch.Tensor:
    """Return B A of one member, the groups' rows below each other."""
    return torch.cat([pair.ups[role].weight @ pair.down.weight for pair in factors.pairs()])  # type: ignore[operator]


@pytest.mark.parametrize("gauge", ["orthogonal", "balanced"])
@pytest.mark.parametrize("form", ["joint", "per_head"])
def test_the_finding_reports_the_measured_error_and_size(form: str, gauge: Gauge) -> None:
    layer, plan = dense_layer({"q": 16, "k": 8}, columns=12, kv_groups=2)
    plan = SitePlan(plan.site, 7, plan.members, plan.paths, form, 5, quant=None)  # type: ignore[arg-type]
    dense = {role: layer.linear(f"{role}_proj") for role in ("q", "k")}
    finding = Factorize(gauge, torch.device("cpu")).rewrite(layer, plan, None)
    factors = layer.module.get_submodule("qk_factors")
    assert isinstance(factors, JointFactors if form == "joint" else GroupedFactors)
    differences = [(linear.weight - product(factors, role)).detach() for role, linear in dense.items()]
    norm = torch.cat([linear.weight.detach() for linear in dense.values()]).norm()
    assert finding.error == pytest.approx(float(torch.cat(differences).norm() / norm), rel=1e-5)
    assert finding.target == "layers.7.qk"
    parameters = sum(
        parameter.numel() for name, parameter in factors.named_parameters() if name.endswith("weight")
    )
    assert finding.bytes_after == 4 * parameters
    assert finding.bytes_before == 4 * 24 * 12
    assert finding.details is not None
    assert finding.details["kept"] == pytest.approx(parameters / (24 * 12))
    assert finding.details["pairs"] == (1 if form == "joint" else 2)
    defect = finding.details["orthogonality_defect"]
    assert defect is None if gauge == "balanced" else defect < 1e-5


def test_the_error_is_the_energy_beyond_the_rank() -> None:
    layer, plan = dense_layer({"q": 16, "k": 8}, columns=12, kv_groups=1)
    stacked = torch.cat([layer.linear(path).weight.detach() for path in plan.paths]).double()
    values = torch.linalg.svdvals(stacked)
    finding = Factorize("orthogonal", torch.device("cpu")).rewrite(layer, plan, None)
    assert finding.error == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-6)


@pytest.mark.parametrize("form", ["joint", "per_head"])
def test_per_head_pairs_hold_the_query_heads_of_their_own_key_head(form: str) -> None:
    layer, plan = dense_layer({"q": 16, "k": 8}, columns=12, kv_groups=2)
    plan = SitePlan(plan.site, 7, plan.members, plan.paths, form, 12, quant=None)  # type: ignore[arg-type]
    dense = {role: layer.linear(f"{role}_proj") for role in ("q", "k")}
    x = torch.randn(3, 12)
    expected = {role: linear(x) for role, linear in dense.items()}
    Factorize("orthogonal", torch.device("cpu")).rewrite(layer, plan, None)
    for role in ("q", "k"):
        torch.testing.assert_close(layer.module.get_submodule(f"{role}_proj")(x), expected[role])


def test_a_wanted_dense_site_is_left_alone() -> None:
    _, plan = dense_layer({"q": 16, "k": 8}, columns=12, kv_groups=2)
    assert Factorize("orthogonal", torch.device("cpu")).applies(plan)
    dense = SitePlan(plan.site, 7, plan.members, plan.paths, "dense", 0, quant=None)
    assert not Factorize("orthogonal", torch.device("cpu")).applies(dense)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("qk", ["whole", "per-head"])
def test_shared_factors_appear_once_in_the_state_dict(source_of: SourceOf, family: str, qk: str) -> None:
    source = source_of(family)
    model = compress(source, floats(("qk",), qk=qk, rank=RankRule("rank", 8))).model
    state = model.state_dict()
    factors = [tensor for name, tensor in state.items() if "_factors." in name]
    assert len({tensor.data_ptr() for tensor in factors}) == len(factors)
    assert not any("q_proj" in name or "k_proj" in name for name in state)
    parameters = list(model.named_parameters(remove_duplicate=False))
    assert len({name for name, _ in parameters}) == len(parameters)


@pytest.mark.parametrize("kv_groups", [1, 2])
@pytest.mark.parametrize("form", ["joint", "per_head"])
def test_empty_factors_have_the_names_and_shapes_of_filled_ones(form: str, kv_groups: int) -> None:
    layer, plan = dense_layer({"q": 16, "k": 8}, columns=12, kv_groups=kv_groups)
    plan = SitePlan(plan.site, 7, plan.members, plan.paths, form, 4, quant=None)  # type: ignore[arg-type]
    empty = empty_factors(layer, plan).state_dict()
    Factorize("orthogonal", torch.device("cpu")).rewrite(layer, plan, None)
    filled = layer.module.get_submodule("qk_factors").state_dict()
    assert {name: tensor.shape for name, tensor in empty.items()} == {n: t.shape for n, t in filled.items()}
    assert all(tensor.is_meta for tensor in empty.values())


def test_spectra_are_collected_once_per_pair() -> None:
    joint = Factorize("orthogonal", torch.device("cpu"))
    layer, plan = dense_layer({"q": 16, "k": 8}, columns=12, kv_groups=2)
    stacked = torch.cat([layer.linear(path).weight.detach() for path in plan.paths]).double()
    joint.rewrite(layer, plan, None)
    (spectrum,) = joint.spectra
    torch.testing.assert_close(torch.tensor(spectrum.singular_values), torch.linalg.svdvals(stacked).float())
    assert (spectrum.target, spectrum.chosen_rank, spectrum.full_rank) == ("layers.7.qk", 5, 12)
