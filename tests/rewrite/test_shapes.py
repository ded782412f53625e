"""Layers that lose dimensions, from the plan to the graph: JSON, refusals, sizes, checkpoints and ONNX parity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import INT4, OnnxModel, SourceOf, floats, logits, tokens
from tiny_models import DECODERS
from torch import Tensor

from rk_export.errors import InputError
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.passes.modules.heads import HeadSlots, PaddedHeads, SlicedHeads
from rk_export.plan import LayerShape, Plan
from rk_export.planning.planner import check_plan, decide_plan
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained
from rk_export.rewrite.sizes import kept_parameters, planned_findings
from rk_export.source.stored import StoredModel

BOUND = 1e-4
EXPERTS = ("mixtral", "qwen3_moe")
SHAPES = {
    "width": (LayerShape(0, ffn_width=80), LayerShape(1, ffn_width=97)),
    "values": (LayerShape(0, value_dim=8), LayerShape(1, value_dim=11)),
    "groups": (LayerShape(1, kv_groups=(1,)),),
    "all": (LayerShape(0, 80, 8, (0,)), LayerShape(1, 96, 15, (1,))),
}
FORMATS = {"float": None, "int4": INT4}


def shaped_plan(source: StoredModel, recipe: Recipe, shapes: tuple[LayerShape, ...]) -> Plan:
    return replace(decide_plan(source, recipe), shapes=shapes)


def shaped(source: StoredModel, shapes: tuple[LayerShape, ...], recipe: Recipe) -> Rewritten:
    return rewrite(source, shaped_plan(source, recipe, shapes))


def allowed(family: str, kind: str) -> tuple[LayerShape, ...]:
    """Return the shapes of a kind as far as a family can take them."""
    shapes = SHAPES[kind]
    if family in EXPERTS:
        shapes = tuple(replace(shape, ffn_width=None) for shape in shapes)
    if family == "olmo2":
        shapes = tuple(replace(shape, kv_groups=None) for shape in shapes)
    return shapes


CASES = [
    (family, kind)
    for family in DECODERS
    for kind in SHAPES
    if (kind, family) not in {("width", "mixtral"), ("width", "qwen3_moe"), ("groups", "olmo2")}
    and (kind == "all" or family in ("llama", "qwen2"))
]


@pytest.mark.whole
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_graph_and_the_checkpoint_compute_what_pytorch_does(
    source_of: SourceOf, tmp_path: Path, family: str, kind: str, bits: str
) -> None:
    """One pass, cached decode, left padding, as many attention nodes as layers; and the same model from disk."""
    source = source_of(family)
    rewritten = shaped(source, allowed(family, kind), floats(quant=FORMATS[bits]))
    ids, model = tokens(source), OnnxModel(rewritten, tmp_path)
    expected = logits(rewritten.model, ids)
    whole, _ = model.run(ids)
    first, past = model.run(ids[:, :9])
    last, _ = model.run(ids[:, 9:10], torch.ones(2, 10, dtype=torch.int64), past)
    assert_close(whole, expected)
    assert_close(torch.cat([first, last], 1), expected[:, :10])
    assert all(fusion.found == fusion.planned for fusion in model.fusions)
    assert model.fusion("GroupQueryAttention").found == source.layer_count
    heads = source.description.heads
    for name, array in past.items():
        assert array.shape[1::2] == (heads.kv_heads, heads.head_dim), name
    save_pretrained(rewritten, tmp_path / "saved", tokenizer_from=source.folder)
    loaded = load_pretrained(tmp_path / "saved")
    assert loaded.plan == rewritten.plan
    assert torch.equal(logits(loaded.model, ids), expected)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= BOUND * float(expected.abs().max())


@pytest.mark.whole
def test_a_padded_and_a_plain_member_of_one_pair_count_it_once(source_of: SourceOf, tmp_path: Path) -> None:
    """The values are narrower and padded, the queries and keys are not; all three read one down-projection."""
    source = source_of("llama")
    rewritten = shaped(source, SHAPES["values"], floats(("qkv",), rank=RankRule("rank", 8)))
    ids, model = tokens(source), OnnxModel(rewritten, tmp_path)
    assert_close(model.run(ids)[0], logits(rewritten.model, ids))
    assert model.fusion("packed projections").found == 2 * source.layer_count  # up-projections, gate and up
    assert model.fusion("packed query, key and value").found == 0


@pytest.mark.whole
def test_half_precision_graphs_pad_and_slice(
    source_of: SourceOf, tmp_path: Path, tolerance: dict[str, float]
) -> None:
    source = source_of("llama")
    rewritten = shaped(source, SHAPES["all"], floats(quant=INT4, ep="portable"))
    ids = tokens(source)
    actual, expected = OnnxModel(rewritten, tmp_path).run(ids)[0], logits(rewritten.model, ids)
    assert float((actual.float() - expected).abs().max()) <= tolerance["fp16"] * float(expected.abs().max())


@pytest.mark.parametrize("bits", FORMATS)
def test_sizes_are_foreseen(source_of: SourceOf, bits: str) -> None:
    """The findings of the plan are those of the work, byte by byte, and add up to what was there."""
    source = source_of("llama")
    plan = shaped_plan(source, floats(("qk",), rank=RankRule("rank", 8), quant=FORMATS[bits]), SHAPES["all"])
    rewritten, planned = rewrite(source, plan), planned_findings(source, plan)
    expected = {finding.target: finding for finding in planned}
    for finding in rewritten.findings:
        if finding.target.endswith(("ffn_width", "value_dim", "kv_groups")):
            assert finding.bytes_before == expected[finding.target].bytes_before > 0
            assert finding.bytes_after == expected[finding.target].bytes_after == 0
    inside = [finding for finding in planned if finding.target.startswith("layers.")]
    matrices = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * source.layer_count
    assert sum(finding.bytes_before for finding in inside) == matrices
    layers = rewritten.model.get_submodule(source.architecture.layers)
    stored = {id(tensor): tensor for tensor in layers.state_dict().values() if tensor.ndim > 1}
    assert sum(finding.bytes_after for finding in inside) == sum(
        tensor.numel() * tensor.element_size() for tensor in stored.values()
    )


def test_parameters_shrink_as_the_plan_says(source_of: SourceOf) -> None:
    source = source_of("llama")
    dense = kept_parameters(shaped(source, (), floats()).model)
    width = kept_parameters(shaped(source, (LayerShape(0, ffn_width=80),), floats()).model)
    values = kept_parameters(shaped(source, (LayerShape(0, value_dim=8),), floats()).model)
    groups = kept_parameters(shaped(source, (LayerShape(0, kv_groups=(1,)),), floats()).model)
    assert dense - width == 48 * 3 * 64
    assert dense - values == 8 * (2 + 4) * 64
    assert dense - groups == (2 * 64 * 64 + 2 * 64 * 32) // 2


FACTORIZED: dict[str, dict[str, Any]] = {
    "qk": {"groups": ("qk",)},
    "per-head": {"groups": ("qk",), "qk": "per-head"},
    "qkv": {"groups": ("qkv",)},
    "all separate": {"groups": ("q", "k", "v", "o", "gate", "up", "down")},
    "gate_up": {"groups": ("gate_up", "down")},
    "identity": {"groups": ("qk", "gate_up")},
    "identity, separate": {"groups": ("q", "k", "v", "o", "gate", "up", "down")},
}


@pytest.mark.whole
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("form", FACTORIZED)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reduced_matrices_can_be_factorized(
    source_of: SourceOf, tmp_path: Path, family: str, form: str, bits: str
) -> None:
    source = source_of(family)
    options = floats(rank=RankRule("rank", 6), quant=FORMATS[bits], **FACTORIZED[form])
    plan = shaped_plan(source, options, SHAPES["all"])
    if form.startswith("identity"):
        sites = tuple(replace(site, form="identity") if site.rank else site for site in plan.sites)
        plan = replace(plan, sites=sites)
    rewritten = rewrite(source, plan)
    ids, model = tokens(source), OnnxModel(rewritten, tmp_path)
    assert_close(model.run(ids)[0], logits(rewritten.model, ids))
    assert all(fusion.found == fusion.planned for fusion in model.fusions)
    save_pretrained(rewritten, tmp_path / "saved", tokenizer_from=source.folder)
    assert torch.equal(logits(load_pretrained(tmp_path / "saved").model, ids), logits(rewritten.model, ids))


@pytest.mark.parametrize("kind", ["groups", "values"])
def test_what_silent_parts_leave_is_the_dense_model(source_of: SourceOf, tmp_path: Path, kind: str) -> None:
    """Groups and value directions that the output projection does not read go without a trace."""
    source = source_of("llama")
    model = source.load()
    for layer in model.model.layers:
        silent = slice(0, 32) if kind == "groups" else [16 * head + i for head in range(4) for i in range(5)]
        layer.self_attn.o_proj.weight[:, silent] = 0
    model.save_pretrained(tmp_path / "silent")
    other = StoredModel(tmp_path / "silent", "silent")
    shapes = {
        "groups": tuple(LayerShape(layer, kv_groups=(1,)) for layer in (0, 1)),
        "values": tuple(LayerShape(layer, value_dim=11) for layer in (0, 1)),
    }
    ids = tokens(source)
    assert_close(logits(shaped(other, shapes[kind], floats()).model, ids), logits(other.load(), ids))


def test_dead_neurons_leave_the_dense_model(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("starcoder2")
    model = source.load()
    for layer in model.model.layers:
        layer.mlp.c_proj.weight[:, 20:60] = 0
    model.save_pretrained(tmp_path / "dead")
    other = StoredModel(tmp_path / "dead", "dead")
    shapes = tuple(LayerShape(layer, ffn_width=88) for layer in (0, 1))
    ids = tokens(source)
    assert_close(logits(shaped(other, shapes, floats()).model, ids), logits(other.load(), ids))


def test_the_place_of_reduced_heads(source_of: SourceOf) -> None:
    layer: Any = shaped(source_of("llama"), SHAPES["all"], floats()).model.get_submodule("model.layers.0")
    attention = layer.self_attn
    assert isinstance(attention.v_proj, PaddedHeads)
    assert isinstance(attention.o_proj, SlicedHeads)
    assert attention.q_proj.slots == HeadSlots(2, 16, 4, 16)
    assert attention.k_proj.slots == HeadSlots(1, 16, 2, 16)
    assert attention.v_proj.slots == HeadSlots(1, 8, 2, 16)
    assert attention.o_proj.slots == HeadSlots(2, 8, 4, 16)


def test_a_plan_with_shapes_comes_back_from_json(source_of: SourceOf, tmp_path: Path) -> None:
    plan = shaped_plan(source_of("llama"), floats(), SHAPES["all"])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.shape_of(1) == SHAPES["all"][1]
    assert replace(plan, shapes=SHAPES["groups"]).shape_of(0) is None
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["shapes"]
    assert Plan.from_json(data) == replace(plan, shapes=())


@pytest.mark.parametrize(
    "build",
    [
        lambda: LayerShape(0),
        lambda: LayerShape(0, ffn_width=0),
        lambda: LayerShape(0, ffn_width=1.5),  # type: ignore[arg-type]
        lambda: LayerShape(0, value_dim=-1),
        lambda: LayerShape(0, kv_groups=()),
        lambda: LayerShape(0, kv_groups=(-1,)),
        lambda: LayerShape(0, kv_groups=(1, 0)),
        lambda: LayerShape(0, kv_groups=(1, 1)),
    ],
)
def test_a_shape_that_says_nothing_sensible_is_refused(build: Callable[[], LayerShape]) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.where == "shapes: layer 0"
    assert caught.value.fix


REFUSED: list[tuple[str, LayerShape, str]] = [
    ("llama", LayerShape(0, ffn_width=128), "takes nothing from 128 neurons"),
    ("llama", LayerShape(0, value_dim=16), "takes nothing from heads of 16"),
    ("llama", LayerShape(0, kv_groups=(0, 1)), "leaves out none"),
    ("llama", LayerShape(0, kv_groups=(2,)), "names others"),
    ("llama", LayerShape(2, ffn_width=8), "no layer 2"),
    ("mixtral", LayerShape(0, ffn_width=8), "every expert"),
    ("qwen3_moe", LayerShape(1, ffn_width=8), "every expert"),
    ("olmo2", LayerShape(0, kv_groups=(0,)), "normalized over all heads"),
    ("bert", LayerShape(0, value_dim=8), "encoder"),
]


@pytest.mark.parametrize(("family", "shape", "reason"), REFUSED)
def test_a_layer_refuses_what_it_cannot_take(
    source_of: SourceOf, family: str, shape: LayerShape, reason: str
) -> None:
    source = source_of(family)
    plan = shaped_plan(source, floats(("qk",)), (shape,))
    with pytest.raises(InputError, match=reason) as caught:
        check_plan(source, plan)
    assert caught.value.fix


def test_a_layer_has_one_shape(source_of: SourceOf) -> None:
    with pytest.raises(InputError, match="layer 1 has two entries"):
        shaped_plan(source_of("llama"), floats(), (LayerShape(1, ffn_width=8), LayerShape(1, value_dim=8)))


def test_a_rank_beyond_the_reduced_matrix_is_refused(source_of: SourceOf) -> None:
    source = source_of("llama")
    plan = shaped_plan(source, floats(("v",), rank=RankRule("rank", 20)), (LayerShape(0, value_dim=8),))
    with pytest.raises(InputError, match="exceeds the full rank 16"):
        check_plan(source, plan)


@pytest.mark.whole
def test_eight_bit_blocks_wider_than_a_reduced_matrix(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    spec = QuantSpec(8, 128, symmetric=False)
    rewritten = shaped(source, SHAPES["all"], floats(quant=spec))
    ids = tokens(source)
    assert_close(OnnxModel(rewritten, tmp_path).run(ids)[0], logits(rewritten.model, ids))
