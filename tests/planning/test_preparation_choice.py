"""Which reparameterizations are taken: costs against the prepared models themselves, and models made to need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from tiny_models import tiny_model
from torch import Tensor

from rk_export.calibration.moments import recorded_inputs
from rk_export.model.layer_wiring import wiring_of
from rk_export.model.preparable import preparations_of
from rk_export.options.prepare import PREPARATIONS, Prepare
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.passes.prepare.parameters import weight
from rk_export.plan import Plan
from rk_export.planning.preparation_choice import Rounding, _state, _Trial, choose_preparations
from rk_export.report.records import Outcome, Report
from rk_export.source.prepared import LayerPreparation, Prepared
from rk_export.source.stored import StoredModel, open_source

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")
INT4 = Rounding(QuantSpec(4, 32), compensated=True, int8_inputs=True)
COMBINATIONS = [
    ("fold-attention",),
    ("fold-mlp", "rotate-heads"),
    ("fold", "rotate"),
    ("fold", "rotate", "rotate-heads", "scale"),
    ("scale",),
]


def some_tokens(source: StoredModel, sequences: int = 4, length: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, source.config.vocab_size, (sequences, length), generator=generator)


def preparation(source: StoredModel, names: tuple[str, ...] = PREPARATIONS) -> LayerPreparation:
    """All preparations, with peaks that differ from neuron to neuron."""
    generator = torch.Generator().manual_seed(2)
    peaks = {
        f"layers.{layer}.{down}": 0.1 + torch.rand(128, generator=generator)
        for layer in range(source.layer_count)
        for _, down in wiring_of(source.description, layer).mlps
    }
    return LayerPreparation(source.description, names, 0, peaks, 0.25)


@torch.no_grad()
def inputs(source: StoredModel, tokens: Tensor, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the matrices of a layer read, and the matrices, in the model as the source gives it."""
    model = source.load()
    module = model.get_submodule(f"{source.architecture.layers}.{layer}")
    modules = {
        item.path: module.get_submodule(item.path)
        for item in source.architecture.projections(source.config, layer)
    }
    with recorded_inputs(modules) as seen:
        model(input_ids=tokens, use_cache=False)
    return dict(seen), {path: weight(part) for path, part in modules.items()}


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
def test_what_is_predicted_for_is_what_the_prepared_model_reads(
    source_of: SourceOf, family: str, names: tuple[str, ...]
) -> None:
    """The reference is the prepared model, run on the same tokens; nothing of the prediction is in it."""
    source = source_of(family)
    possible = preparations_of(source.description, names).names
    if possible != names:
        pytest.skip("the family does not take these")
    tokens, known, layer = some_tokens(source), preparation(source, names), 1
    seen, _ = inputs(source, tokens, layer)
    prepared = source.then(Prepared(source.description, names, seed=0, peaks=known.peaks, alpha=0.25))
    expected, _ = inputs(prepared, tokens, layer)
    dense = source.load().get_submodule(f"{source.architecture.layers}.{layer}")
    trial = _Trial(layer, dense, wiring_of(source.description, layer), known, INT4, seen)
    for item in source.architecture.projections(source.config, layer):
        read = trial._read(item.path, _state(item.role, names), seen[item.path].flatten(0, -2))
        wanted = expected[item.path].flatten(0, -2)
        torch.testing.assert_close(read, wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))


def with_gains(folder: Path, *, folding_helps: bool) -> StoredModel:
    """Save a tiny model whose norm gains differ by a factor of hundreds, and open it.

    With plain matrices, folding the gains in makes the columns of a block differ; with matrices that hold the
    inverse, folding makes them alike.
    """
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        gains = torch.exp(2.5 * torch.randn(64, generator=generator))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = gains.clone()
        if folding_helps:
            readers = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            for linear in (*readers, layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.data /= gains
    model.save_pretrained(folder)
    return open_source(folder)


@pytest.mark.parametrize("folding_helps", [True, False])
def test_gains_are_folded_where_that_evens_out_the_columns(tmp_path: Path, folding_helps: bool) -> None:
    source = with_gains(tmp_path, folding_helps=folding_helps)
    names = ("fold", "rotate-heads")
    floats = replace(INT4, compensated=False, int8_inputs=False)
    choice = choose_preparations(source, some_tokens(source), floats, preparation(source, names), CPU)
    assert (
        {"fold-attention", "fold-mlp"} <= set(choice.names)
        if folding_helps
        else "fold" not in "".join(choice.names)
    )
    told = {finding.target: finding for finding in choice.findings}
    for part in ("prepare.fold-attention", "prepare.fold-mlp"):
        losses = (told[part].details or {})["predicted_loss"]
        assert (losses["with"] < losses["without"]) is folding_helps
        assert (told[part].outcome is Outcome.APPLIED) is folding_helps
        assert "nats a token" in told[part].reason


def test_the_choice_follows_the_format(source_of: SourceOf) -> None:
    """`scale` pays for int8 inputs, whose step is set by the largest of them; it is offered nowhere else."""
    source = source_of("llama")
    known = preparation(source)
    known.peaks["layers.0.mlp.down_proj"][3] = 1e3
    int8 = choose_preparations(
        source, some_tokens(source), Rounding(W8A8, compensated=False, int8_inputs=False), known, CPU
    )
    assert any(finding.target == "prepare.scale" for finding in int8.findings)


def test_a_part_of_fold_needs_its_norm(source_of: SourceOf) -> None:
    """The norms of olmo2 follow the blocks: there is nothing in front that could be folded."""
    found = preparations_of(source_of("olmo2", tie_word_embeddings=False).description, ("fold-mlp",))
    assert found.names == ()
    assert "follow its blocks" in found.findings[0].reason


def test_experts_are_predicted_for(source_of: SourceOf) -> None:
    source = source_of("mixtral")
    names = ("fold", "rotate", "rotate-heads")
    known = LayerPreparation(source.description, names, 0, {}, 0.25)
    choice = choose_preparations(source, some_tokens(source), INT4, known, CPU)
    assert {finding.target for finding in choice.findings} == {
        "prepare.fold-attention",
        "prepare.fold-mlp",
        "prepare.rotate",
        "prepare.rotate-heads",
    }


@pytest.mark.whole
def test_the_plan_names_what_was_decided(cli: Cli, llama: Path, tmp_path: Path) -> None:
    """Applying the plan decides nothing again: the bundle is the same."""
    arguments: tuple[Any, ...] = ("--recipe", "int4", "--set", "calibration.tokens=512", "--device", "cpu")
    assert cli("compress", llama, "-o", tmp_path / "a", *arguments).code == 0
    plan = Plan.load(tmp_path / "a" / "plan.json")
    assert plan.recipe.find(Prepare) not in (None, Prepare("auto"))
    assert cli("compress", llama, "-o", tmp_path / "b", "--plan", tmp_path / "a" / "plan.json").code == 0
    files = ("model.onnx", "model.onnx.data")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    told = {finding.target for finding in Report.load(tmp_path / "a" / "report.json").findings}
    assert {"prepare.fold-attention", "prepare.rotate"} <= told
