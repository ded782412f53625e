"""Whole blocks, neurons and heads that go: what is left is an ordinary, smaller model of its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from made_recipes import made_recipe
from tiny_models import DECODERS
from torch import Tensor, nn

from rk_export.commands.checks import check_options
from rk_export.commands.compress import compress
from rk_export.commands.compression_inputs import CompressionInputs, compression_inputs
from rk_export.commands.verify import verify
from rk_export.errors import InputError
from rk_export.graph.build import build_graph, save_graph
from rk_export.methods.heal import method as heal_method
from rk_export.methods.heal.options import HealOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.prune.pruned import Pruned
from rk_export.model.plain_form import plain_model
from rk_export.options.calibration import UNWEIGHED, CalibrationOptions
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.plan import Plan, Pruning
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained
from rk_export.source.prepared import Prepared
from rk_export.source.stored import StoredModel, open_source

SourceOf = Callable[..., StoredModel]
NO_HEADS = ("gpt2", "opt", "olmo2")
NO_WIDTH = ("mixtral", "qwen3_moe")


def options(prune: PruneOptions | None = None, **changes: Any) -> Recipe:
    fields = {
        "groups": (),
        "quant": None,
        "table": None,
        "prepare": (),
        "accuracy_level": 0,
        "calibration": UNWEIGHED,
        "methods": () if prune is None else (prune,),
    }
    return made_recipe(**{**fields, **changes})


def plan_of(inputs: CompressionInputs) -> Plan:
    return replace(decide_plan(inputs.source, inputs.recipe), pruning=inputs.source.pruning)


def rewritten_of(source: StoredModel, asked: Recipe) -> Rewritten:
    inputs = compression_inputs(source, asked)
    return inputs.rewrite(plan_of(inputs))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids).logits
    return result


def ids_for(source: StoredModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, source.config.vocab_size, (2, 12), generator=generator)


def parts_for(family: str) -> PruneOptions:
    """Return all that a family of four blocks can lose, without text: blocks are named in the plan instead."""
    return PruneOptions(
        ffn_keep=1.0 if family in NO_WIDTH else 0.75, kv_heads_keep=None if family in NO_HEADS else 1
    )


@pytest.mark.parametrize("family", [name for name in DECODERS if name not in (*NO_WIDTH, *NO_HEADS)])
def test_what_is_left_is_a_model_of_its_family(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    rewritten = rewritten_of(source, options(parts_for(family)))
    config = rewritten.model.config
    assert (config.intermediate_size, config.num_key_value_heads) == (96, 1)
    plain = plain_model(rewritten.model)
    ids = ids_for(source)
    assert torch.allclose(logits(plain, ids), logits(rewritten.model, ids), atol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_the_graph_and_its_cache_are_smaller(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    source = source_of(family)
    count = source.layer_count
    pruning = Pruning(tuple(range(1, count)), 96)
    if family not in NO_HEADS:
        pruning = replace(pruning, kv_groups=((1,),) * (count - 1))
    inputs = compression_inputs(source, options(PruneOptions(blocks=1)), pruning=pruning)
    rewritten = inputs.rewrite(plan_of(inputs))
    graph, _ = build_graph(rewritten)
    save_graph(graph, tmp_path)
    graph_inputs = {item.name: item for item in onnx.load(tmp_path / "model.onnx").graph.input}
    caches = [name for name in graph_inputs if name.startswith("past_key_values") and name.endswith("key")]
    assert len(caches) == count - 1
    heads = graph_inputs[caches[0]].type.tensor_type.shape.dim[1].dim_value
    assert heads == (source.description.heads.kv_heads if family in NO_HEADS else 1)


def test_a_dropped_block_is_left_out_exactly(source_of: SourceOf) -> None:
    source = source_of("gemma3")
    ids = ids_for(source)
    wanted = source.load()
    layers = wanted.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    wanted.set_submodule("model.layers", nn.ModuleList([layers[0], layers[2], layers[3]]))
    wanted.config.num_hidden_layers = 3
    wanted.config.layer_types = [source.config.layer_types[block] for block in (0, 2, 3)]
    inputs = compression_inputs(source, options(PruneOptions(blocks=1)), pruning=Pruning((0, 2, 3)))
    found = inputs.rewrite(plan_of(inputs)).model
    assert found.config.layer_types == wanted.config.layer_types
    for number, layer in enumerate(wanted.get_submodule("model.layers").children()):
        layer.get_submodule("self_attn").layer_idx = number  # type: ignore[assignment]
    assert torch.allclose(logits(found, ids), logits(wanted, ids), atol=1e-5)


def silenced(source: StoredModel, folder: Path, change: Callable[[nn.Module], None]) -> StoredModel:
    """Return a copy of a model after a change to it."""
    model = source.load()
    with torch.no_grad():
        change(model)
    plain_model(model).save_pretrained(folder)
    return StoredModel(folder, "changed")


def with_text(prune: PruneOptions, **changes: Any) -> Recipe:
    return options(prune, calibration=CalibrationOptions(tokens=512), **changes)


def test_the_block_that_changes_nothing_goes(llama: Path, tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{path}").weight.zero_()  # type: ignore[operator]

    source = open_source(llama)
    changed = silenced(source, tmp_path / "silent", change)
    for file in llama.glob("*token*"):
        (tmp_path / "silent" / file.name).write_bytes(file.read_bytes())
    rewritten = rewritten_of(changed, with_text(PruneOptions(blocks=1)))
    assert rewritten.plan.pruning == Pruning((0,))
    ids = ids_for(source)
    assert torch.allclose(logits(rewritten.model, ids), logits(changed.load(), ids), atol=1e-5)
    assert [item.target for item in rewritten.findings if item.target.startswith("pruned")] == [
        "pruned.block_1"
    ]


def test_neurons_and_heads_that_do_nothing_go(llama: Path, tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        for number in range(2):
            layer = model.get_submodule(f"model.layers.{number}")
            layer.get_submodule("mlp.down_proj").weight[:, 5:37] = 0  # type: ignore[operator,index]
            layer.get_submodule("self_attn.o_proj").weight[:, 32 * number : 32 * number + 32] = 0  # type: ignore[operator,index]

    source = open_source(llama)
    changed = silenced(source, tmp_path / "dead", change)
    rewritten = rewritten_of(changed, options(PruneOptions(ffn_keep=0.75, kv_heads_keep=1)))
    assert rewritten.plan.pruning is not None
    assert rewritten.plan.pruning.kv_groups == ((1,), (0,))
    ids = ids_for(source)
    assert torch.allclose(logits(rewritten.model, ids), logits(changed.load(), ids), atol=1e-4)


def test_statistics_make_up_for_what_goes(llama: Path) -> None:
    source = open_source(llama)
    ids = ids_for(source)
    wanted = logits(source.load(), ids)
    prune = PruneOptions(ffn_keep=0.75)
    errors = [
        float((logits(rewritten_of(source, asked).model, ids) - wanted).norm())
        for asked in (with_text(prune), options(prune))
    ]
    assert errors[0] < errors[1]


def test_statistics_are_those_of_the_block_that_stays(llama: Path) -> None:
    source = open_source(llama)
    known = compression_inputs(
        source, options(groups=("qk",), calibration=CalibrationOptions(tokens=512))
    ).statistics
    device = torch.device("cpu")
    alone = source.then(Pruned(source.description, Pruning((1,), 96), known, device)).load()
    both = source.then(Pruned(source.description, Pruning((0, 1), 96), known, device)).load()
    path = "mlp.down_proj.weight"
    assert torch.equal(
        alone.get_parameter(f"model.layers.0.{path}"), both.get_parameter(f"model.layers.1.{path}")
    )


@pytest.mark.whole
def test_recovery_aims_at_the_whole_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[StoredModel] = []
    train = heal_method.heal

    def recorded(rewritten: Rewritten, teacher: StoredModel, *arguments: Any, **named: Any) -> Any:
        teachers.append(teacher)
        return train(rewritten, teacher, *arguments, **named)

    monkeypatch.setattr(heal_method, "heal", recorded)
    asked = with_text(
        PruneOptions(blocks=1, ffn_keep=0.75), groups=("qk",), rank=RankRule("keep", 0.9)
    ).with_step(HealOptions(steps=2))
    report = compress(llama, tmp_path / "out", asked)
    assert [teacher.pruning for teacher in teachers] == [None]
    assert all(tier.passed is not False for tier in report.parity)


@pytest.mark.whole
def test_a_pruned_bundle_is_verified_and_made_again(llama: Path, tmp_path: Path) -> None:
    asked = made_recipe(
        methods=(PruneOptions(blocks=1, ffn_keep=0.75, kv_heads_keep=1),),
        calibration=CalibrationOptions(tokens=512),
    )
    report = compress(llama, tmp_path / "out", asked, checkpoint=tmp_path / "saved")
    first = next(tier for tier in report.parity if tier.tier == "a")
    assert first.max_error > 0.01  # against the whole model, not against what is left of it
    assert all(tier.passed is not False for tier in verify(tmp_path / "out", llama))
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan.pruning is not None
    again = compress(llama, tmp_path / "again", plan=plan)
    once_more = next(tier for tier in again.parity if tier.tier == "a")
    assert once_more.max_error == pytest.approx(first.max_error, rel=1e-3)
    loaded = load_pretrained(tmp_path / "saved")
    assert loaded.model.config.num_hidden_layers == 1


def test_checkpoints_of_pruned_models_load(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    rewritten = rewritten_of(source, options(PruneOptions(ffn_keep=0.75, kv_heads_keep=1)))
    save_pretrained(rewritten, tmp_path / "saved", tokenizer_from=source.folder)
    ids = ids_for(source)
    assert torch.equal(logits(load_pretrained(tmp_path / "saved").model, ids), logits(rewritten.model, ids))


def test_sources_of_one_folder_are_told_apart(source_of: SourceOf) -> None:
    source = source_of("llama")
    pruned = source.then(Pruned(source.description, Pruning((0,)), None, torch.device("cpu")))
    wider = source.then(Pruned(source.description, Pruning((1,)), None, torch.device("cpu")))
    rotated = source.then(Prepared(source.description, ("fold", "rotate")))
    turned = source.then(Prepared(source.description, ("fold", "rotate"), seed=1))
    known = [item.fingerprint() for item in (source, pruned, wider, rotated, turned)]
    assert len(set(known)) == 5  # what is cached for one, such as a teacher's states, is not the other's
    assert pruned.structure() == source.structure()


@pytest.mark.parametrize(
    ("family", "prune", "message"),
    [
        ("llama", PruneOptions(blocks=2), "2 of 2 blocks"),
        ("llama", PruneOptions(blocks=1), "blocks are judged on text"),
        ("llama", PruneOptions(ffn_keep=0.1), "less than 32"),
        ("llama", PruneOptions(kv_heads_keep=2), "not fewer than 2"),
        ("gpt2", PruneOptions(kv_heads_keep=1), "ties the width"),
        ("helium", PruneOptions(kv_heads_keep=1), "ties the width"),
        ("olmo2", PruneOptions(kv_heads_keep=1), "normalized over all heads"),
        ("mixtral", PruneOptions(ffn_keep=0.5), "every expert"),
        ("bert", PruneOptions(ffn_keep=0.5), "an encoder loses no blocks"),
    ],
)
def test_what_cannot_go_is_refused(
    source_of: SourceOf, family: str, prune: PruneOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_options(source_of(family), options(prune))


def test_a_plan_of_another_pruning_is_refused(source_of: SourceOf) -> None:
    source = source_of("llama")
    inputs = compression_inputs(source, options(PruneOptions(ffn_keep=0.75)))
    plan = replace(plan_of(inputs), pruning=Pruning((0, 1), 64))
    with pytest.raises(InputError, match="other blocks, neurons or heads"):
        inputs.rewrite(plan)


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": ()},
        {"blocks": (1, 0)},
        {"blocks": (0,), "ffn_width": 0},
        {"blocks": (0, 1), "kv_groups": ((0,),)},
        {"blocks": (0, 1), "kv_groups": ((0,), (0, 1))},
    ],
)
def test_a_pruning_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Pruning(**fields)


def test_plans_keep_the_pruning_in_json(source_of: SourceOf) -> None:
    inputs = compression_inputs(source_of("llama"), options(PruneOptions(ffn_keep=0.75, kv_heads_keep=1)))
    plan = plan_of(inputs)
    assert Plan.from_json(plan.to_json()) == plan
