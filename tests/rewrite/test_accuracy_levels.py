"""Accuracy level 4 is left where its int8 inputs would be the larger error, and kept elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from conftest import tiny_options
from tiny_models import massive, tiny_model
from torch import Tensor

from rk_export import compress
from rk_export.calibration import text_run
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.passes.modules.quantized import QuantizedLinear
from rk_export.passes.numerics.int8_inputs import int8_inputs
from rk_export.planning.planner import decide_plan
from rk_export.report.records import Report
from rk_export.rewrite import accuracy_levels
from rk_export.rewrite.accuracy_levels import choose_levels
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.source.stored import StoredModel, open_source


def levels(bundle: Path) -> dict[str, int]:
    """Return the accuracy level of each MatMulNBits by the site that it stands for."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return {
        node.name: next(item.i for item in node.attribute if item.name == "accuracy_level")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }


@pytest.mark.whole
@pytest.mark.parametrize("metric_none", [True, False])
def test_massive_activations_keep_float_inputs(llama: Path, tmp_path: Path, metric_none: bool) -> None:
    options = tiny_options(groups=(), rank=None) if metric_none else Recipe.load("int4")
    report = compress(massive(llama, tmp_path / "model"), tmp_path / "out", options, run=Run(threads=1))
    found = set(levels(tmp_path / "out").values())
    assert found == {1, 4}, "the layer in front of the massive row is untouched"
    told = [finding for finding in report.findings if (finding.details or {}).get("pass") == "accuracy level"]
    assert told
    assert all("computes in floats" in finding.reason for finding in told)
    tiers = {tier.tier: tier for tier in report.parity}
    assert tiers["d"].passed
    assert Report.load(tmp_path / "out" / "report.json").findings == report.findings


@pytest.mark.whole
def test_what_keeps_floats_is_what_the_report_names(bundle: Path) -> None:
    """Speed is kept elsewhere: level 4 stays the rule."""
    found = levels(bundle)
    told = {
        finding.target.rpartition(".")[2]
        for finding in Report.load(bundle / "report.json").findings
        if (finding.details or {}).get("pass") == "accuracy level"
    }
    assert 4 in found.values()
    assert (1 in found.values()) is bool(told)


def test_matrices_that_read_the_same_are_decided_together(llama: Path, tmp_path: Path) -> None:
    """The graph packs them into one product, which has one level."""
    source = open_source(massive(llama, tmp_path / "model"))
    options = tiny_options(groups=(), rank=None)
    probe = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    rewritten = choose_levels(rewrite(source, decide_plan(source, options), probe=probe), probe)
    layer = rewritten.model.get_submodule("model.layers.0.self_attn")
    flags = {
        name: module.reads_floats
        for name, module in layer.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert flags["q_proj"] == flags["k_proj"] == flags["v_proj"] is True


@pytest.mark.whole
def test_second_factors_of_a_pair_are_decided_together(tmp_path: Path) -> None:
    """Near the bound one of them alone would pass it; the graph packs them all the same."""
    tiny_model("smollm3").save_pretrained(tmp_path / "model")
    report = compress(tmp_path / "model", tmp_path / "out", tiny_options(groups=("qk",)), run=Run(threads=1))
    assert all(fusion.found == fusion.planned for fusion in report.fusions)


def whole_model_losses(rewritten: Rewritten, probe: Tensor) -> dict[str, float]:
    """Return the predicted loss by matrix from one pass of the whole model, forward and back."""
    losses: dict[str, float] = {}
    handles = []

    def watch(name: str, module: QuantizedLinear) -> None:
        def note(_: object, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            error = (
                int8_inputs(arguments[0].detach(), module.spec) - arguments[0].detach()
            ) @ module.weight.T

            def add(gradient: Tensor) -> None:
                losses[name] = 0.5 * float((error * gradient).sum(-1).double().square().sum()) / probe.numel()

            output.register_hook(add)

        handles.append(module.register_forward_hook(note))

    for name, module in rewritten.model.named_modules():
        if isinstance(module, QuantizedLinear):
            watch(name, module)
    embedding = rewritten.model.get_submodule(rewritten.architecture.embedding)
    handles.append(embedding.register_forward_hook(lambda *args: args[2].detach().requires_grad_(True)))
    logits = rewritten.model(input_ids=probe, use_cache=False).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return losses


@pytest.mark.parametrize("tokens_together", [4 * 32, 7])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_layer_at_a_time_predicts_what_the_whole_model_predicts(
    source_of: Callable[..., StoredModel],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    tokens_together: int,
) -> None:
    monkeypatch.setattr(text_run, "LOGITS_TOGETHER", tokens_together * 160)
    monkeypatch.setattr(accuracy_levels, "LARGEST_LOSS", 0.0)
    source = source_of(family)
    probe = torch.randint(3, 160, (4, 32), generator=torch.Generator().manual_seed(0))
    rewritten = rewrite(source, decide_plan(source, tiny_options(groups=(), rank=None)))
    expected = whole_model_losses(rewritten, probe)
    chosen = choose_levels(rewritten, probe)
    found = {
        item.target: item.details["predicted_loss"] for item in chosen.findings if "level" in item.details
    }
    names = {"down": "mlp.down_proj", "o": "self_attn.o_proj"}
    alone = [name for name in found if name == "lm_head" or name.rpartition(".")[2] in names]
    assert len(alone) > 2
    for site in alone:
        layer, _, group = site.rpartition(".")
        path = "lm_head" if site == "lm_head" else f"model.{layer}.{names[group]}"
        assert found[site] == pytest.approx(expected[path], rel=1e-4)


def test_other_levels_are_left_alone(llama: Path, tmp_path: Path) -> None:
    source = open_source(massive(llama, tmp_path / "model"))
    probe = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    for changes in ({"accuracy_level": 0}, {"ep": "portable"}):
        options = tiny_options(groups=(), rank=None, **changes)
        rewritten = rewrite(source, decide_plan(source, options))
        assert choose_levels(rewritten, probe) is rewritten
