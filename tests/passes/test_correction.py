"""The branch that corrects a quantized matrix: its error, its place in PyTorch, in checkpoints and in the graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from compressed import OnnxModel, SourceOf, floats, logits, tokens
from torch import Tensor, nn

from rk_export.options.quantization import QuantSpec
from rk_export.passes.base import Layer, run_weight_pass
from rk_export.passes.modules.quantized import CorrectedLinear
from rk_export.passes.numerics.correction import quantize_corrected
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.joint_svd import joint_factors
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.quantize import quantize_rtn
from rk_export.passes.weights.quantize import Quantize
from rk_export.plan import SitePlan
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained
from rk_export.rewrite.sizes import planned_findings
from rk_export.source.stored import StoredModel

CPU = torch.device("cpu")
INT2 = QuantSpec(2, 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(columns: int) -> Tensor:
    x = random(500, columns, seed=1) * torch.linspace(0.1, 3, columns)
    return x.T @ x / 500


def error(W: Tensor, approximation: Tensor, second: Tensor) -> float:
    E = (approximation - W).double()
    return float((E @ second.double() * E).sum())


def test_the_error_falls_with_the_rank_and_under_the_metric() -> None:
    W, second = random(48, 64), second_moment(64)
    quantize, metric = partial(quantize_rtn, spec=INT2), Metric.of(second)
    errors = [error(W, quantize(W).dequantize(), second)]
    errors += [error(W, quantize_corrected(W, rank, quantize, metric).dense(), second) for rank in (2, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]
    blind = quantize_corrected(W, 8, quantize).dense()
    assert errors[2] < 0.9 * error(W, blind, second)
    full = quantize_corrected(W, 48, quantize, metric)
    torch.testing.assert_close(full.dense(), W, rtol=0, atol=1e-4)


def test_setting_leading_directions_aside_beats_correcting_afterwards() -> None:
    W = random(64, 8, seed=3) @ random(8, 64, seed=4) + 0.3 * random(64, 64, seed=5)
    quantize = partial(quantize_rtn, spec=INT2)
    left = W - quantize(W).dequantize()
    after = joint_factors(left, 8)
    corrected = quantize_corrected(W, 8, quantize).dense()
    assert float((corrected - W).norm()) < 0.9 * float((left - after.up @ after.down).norm())


@pytest.mark.parametrize("known", [True, False])
def test_the_pass_installs_and_reports_the_branch(known: bool) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.o_proj = nn.Linear(64, 48)
    dense, bias = module.o_proj.weight.detach().clone(), module.o_proj.bias
    plan = SitePlan("layers.0.o", 0, ("o",), ("o_proj",), "dense", 0, INT2, correction=6)
    statistics = {plan.site: Curvature(Inputs(second_moment(64)))} if known else {}
    quantize = Quantize(torch.float16, CPU, "gptq")
    (finding,) = run_weight_pass(quantize, Layer(0, module, 1), [plan], statistics)

    corrected = module.o_proj
    assert isinstance(corrected, CorrectedLinear)
    x = random(3, 64, seed=9)
    torch.testing.assert_close(corrected(x), x @ corrected.weight.T + bias)
    assert finding.error == pytest.approx(float((corrected.weight - dense).norm() / dense.norm()), rel=1e-4)
    assert finding.details is not None
    assert finding.details["correction"] == 6
    assert ("weighted_error" in finding.details) is known
    assert finding.details["quantizer"] == ("gptq" if known else "search")
    assert bool(finding.reason) is not known
    stored = [tensor for name, tensor in module.state_dict().items() if not name.endswith("bias")]
    assert finding.bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in stored)


def corrected_model(source: StoredModel, members: tuple[str, ...]) -> Rewritten:
    """Rewrite a source with the matrices of some roles corrected at rank 4, the others plainly quantized."""
    plan = decide_plan(source, floats(quant=QuantSpec(4, 16), table=QuantSpec(8, 16)))
    sites = tuple(
        replace(site, correction=4) if set(site.members) & set(members) else site for site in plan.sites
    )
    return rewrite(source, replace(plan, sites=sites))


@pytest.mark.whole
@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])  # olmo2: norms right behind q, k, o and down
@pytest.mark.parametrize("members", [("q",), ("q", "k", "v"), ("o", "gate", "up", "down")], ids="-".join)
def test_the_graph_equals_pytorch(
    source_of: SourceOf, tmp_path: Path, family: str, members: tuple[str, ...]
) -> None:
    source = source_of(family)
    rewritten = corrected_model(source, members)
    model, ids = OnnxModel(rewritten, tmp_path), tokens(source)
    expected = logits(rewritten.model, ids)
    actual, _ = model.run(ids)
    assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    counts = Counter(node.op_type for node in model.graph.graph)
    layers = rewritten.model.config.num_hidden_layers
    readers = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
    inputs = {readers.get(member, member) for member in members}  # down-projections of one input are packed
    assert counts["MatMul"] == layers * (len(inputs) + len(members))


def test_a_checkpoint_holds_the_branch(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    rewritten = corrected_model(source, ("q", "down"))
    save_pretrained(rewritten, tmp_path / "out", tokenizer_from=source.folder)
    loaded = load_pretrained(tmp_path / "out")
    ids = tokens(source)
    assert torch.equal(logits(loaded.model, ids), logits(rewritten.model, ids))
    kinds = [isinstance(module, CorrectedLinear) for module in loaded.model.modules()]
    assert sum(kinds) == 2 * rewritten.model.config.num_hidden_layers


def test_planned_bytes_count_the_branch(source_of: SourceOf) -> None:
    source = source_of("llama")
    rewritten = corrected_model(source, ("down",))
    planned = {finding.target: finding.bytes_after for finding in planned_findings(source, rewritten.plan)}
    applied = {finding.target: finding.bytes_after for finding in rewritten.findings}
    site = next(site.site for site in rewritten.plan.sites if site.correction)
    assert planned[site] == applied[site]
