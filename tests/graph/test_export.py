"""Parity of the exported graph with the rewritten PyTorch model, for every family, grouping and format.

Bounds are those of parity tier c: the largest difference of a logit over the largest logit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from compressed import INT4, OnnxModel, SourceOf, compress, floats, logits, tokens
from tiny_models import FAMILIES
from torch import Tensor

from rk_export.graph.build import build_graph
from rk_export.model.families.registry import decoder_spec
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import GROUPS, RankRule
from rk_export.options.recipe import Recipe
from rk_export.passes.modules.factors import JointMember
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.source.stored import StoredModel

BOUND = 1e-4
NO_GATE = ("starcoder2", "gpt2", "opt", "mixtral", "qwen3_moe", "bert")
FORMS = ("dense", "joint", "per-head")
FORMATS = {"float": None, "int4": INT4}
CASES = [(family, form, bits) for family in FAMILIES for form in FORMS for bits in FORMATS]


def options_of(family: str, form: str, bits: str) -> Recipe:
    groups = {"dense": (), "per-head": ("qk",), "joint": ("qk",) if family in NO_GATE else ("qk", "gate_up")}
    return floats(
        groups[form],
        qk="per-head" if form == "per-head" else "whole",
        rank=RankRule("keep", 0.9),
        rank_multiple=8,
        quant=FORMATS[bits],
        table=None if bits == "float" else QuantSpec(8, 16),
    )


class Exported:
    """A rewritten model with its graph."""

    def __init__(self, rewritten: Rewritten, folder: Path) -> None:
        self.rewritten, self.onnx = rewritten, OnnxModel(rewritten, folder)

    def expected(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        return logits(self.rewritten.model, ids, **inputs)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(
    request: pytest.FixtureRequest, source_of: SourceOf, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    family, form, bits = request.param
    rewritten = compress(source_of(family), options_of(family, form, bits))
    assert any(isinstance(module, JointMember) for module in rewritten.model.modules()) is (form != "dense")
    return Exported(rewritten, tmp_path_factory.mktemp("onnx"))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= BOUND * float(expected.abs().max())


@pytest.mark.whole
def test_one_pass_equals_pytorch(exported: Exported) -> None:
    ids = tokens_for(exported, 2, 12)
    expected = exported.expected(ids)
    assert_close(exported.onnx.run(ids)[0], expected)
    assert float(expected.abs().max()) > 0.1


@pytest.mark.whole
@pytest.mark.parametrize(("batch", "ends"), [(2, (6, 7, 8, 9, 10, 11, 12)), (1, (5, 9, 10, 12))])
def test_cached_decode_equals_one_pass(exported: Exported, batch: int, ends: tuple[int, ...]) -> None:
    """Token by token; a single row in pieces too, which GroupQueryAttention does not take in batches."""
    if exported.rewritten.architecture.is_encoder:
        pytest.skip("an encoder has no cache")
    ids = tokens_for(exported, batch, 12)
    parts, past = [], None
    for start, end in zip((0, *ends), ends, strict=False):
        mask = torch.ones(batch, end, dtype=torch.int64)
        part, past = exported.onnx.run(ids[:, start:end], mask, past)
        parts.append(part)
    assert_close(torch.cat(parts, dim=1), exported.expected(ids))


@pytest.mark.whole
def test_padded_rows_equal_single_rows(exported: Exported) -> None:
    """Padding stands in front in a decoder, prefill and decode, and behind in an encoder."""
    ids, short = tokens_for(exported, 2, 12), 7
    if exported.rewritten.architecture.is_encoder:
        mask = torch.ones_like(ids)
        mask[1, short:] = 0
        expected = [exported.expected(ids[:1])[0], exported.expected(ids[1:, :short])[0]]
        output, _ = exported.onnx.run(ids, mask)
        assert_close(output[0], expected[0])
        assert_close(output[1, :short], expected[1])
        return
    expected = [exported.expected(ids[:1])[0], exported.expected(ids[1:, -short:])[0]]
    ids[1, :-short], mask = 0, torch.ones_like(ids)
    mask[1, :-short] = 0
    whole, _ = exported.onnx.run(ids, mask)
    first, past = exported.onnx.run(ids[:, :9], mask[:, :9])
    rest = []
    for position in range(9, 12):
        step, past = exported.onnx.run(ids[:, position : position + 1], mask[:, : position + 1], past)
        rest.append(step)
    for output in (whole, torch.cat([first, *rest], dim=1)):
        assert_close(output[0], expected[0])
        assert_close(output[1, -short:], expected[1])


def tokens_for(exported: Exported, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = exported.rewritten.model.config.vocab_size
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


@pytest.mark.whole
def test_the_fusions_found_are_those_planned(exported: Exported) -> None:
    fusions = exported.onnx.fusions
    assert all(fusion.found == fusion.planned for fusion in fusions)
    rewritten = exported.rewritten
    if rewritten.architecture.is_encoder:
        return
    layers = rewritten.model.config.num_hidden_layers
    assert exported.onnx.fusion("GroupQueryAttention").found == layers
    assert exported.onnx.fusion("padding mask").found == layers
    assert exported.onnx.fusion("logits of the last positions").found == 1
    assert exported.onnx.fusion("residual sum with norm").found >= 1
    normed = decoder_spec(rewritten.model.config).query_key_norm is not None
    dense = not any(isinstance(module, JointMember) for module in rewritten.model.modules())
    packed = exported.onnx.fusion("packed query, key and value").found
    assert packed == (layers if dense and not normed else 0)


@pytest.mark.whole
def test_the_interface_is_that_of_genai(exported: Exported) -> None:
    inputs = {value.name: value for value in exported.onnx.session.get_inputs()}
    outputs = {value.name: value for value in exported.onnx.session.get_outputs()}
    rewritten = exported.rewritten
    if rewritten.architecture.is_encoder:
        assert inputs.keys() == {"input_ids", "attention_mask", "token_type_ids"}
        assert outputs.keys() == {"last_hidden_state"}
        return
    heads = rewritten.description.heads
    cache = {
        f"{index}.{part}"
        for index in range(rewritten.model.config.num_hidden_layers)
        for part in ("key", "value")
    }
    assert inputs.keys() == {"input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cache)}
    assert outputs.keys() == {"logits", *(f"present.{name}" for name in cache)}
    for name in cache:
        for shape in (inputs[f"past_key_values.{name}"].shape, outputs[f"present.{name}"].shape):
            assert (shape[1], shape[3]) == (heads.kv_heads, heads.head_dim)
    assert [value.name for value in exported.onnx.session.get_overridable_initializers()] == ["logits_start"]


@pytest.mark.whole
def test_the_file_is_valid_and_stores_no_weight_twice(exported: Exported) -> None:
    """The file is as large as the PyTorch state, but for the rotary tables and small constants."""
    onnx.checker.check_model(exported.onnx.folder / "model.onnx")
    state = {tensor.data_ptr(): tensor for tensor in exported.rewritten.model.state_dict().values()}
    stored = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    written = exported.onnx.graph.graph.initializers.items()
    sizes = {name: value.const_value.nbytes for name, value in written if value.const_value is not None}
    rotary = sum(size for name, size in sizes.items() if "rotary" in name)
    assert 0 < sum(sizes.values()) - rotary <= 1.02 * stored + 1024


@pytest.mark.whole
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", FORMATS)
def test_every_group_exports(source_of: SourceOf, tmp_path: Path, group: str, bits: str) -> None:
    source = source_of("lfm2" if group.startswith("conv") else "llama")
    rewritten = compress(source, floats((group,), rank=RankRule("rank", 16), quant=FORMATS[bits]))
    ids = tokens(source)
    model = OnnxModel(rewritten, tmp_path)
    assert_close(model.run(ids)[0], logits(rewritten.model, ids))
    members = sum(GROUPS[group][0] in roles for roles in _roles(source))
    assert model.fusion("shared down-projection").found == members


def _roles(source: StoredModel) -> list[set[str]]:
    return [{item.role for item in source.description.projections(i)} for i in range(source.layer_count)]


@pytest.mark.whole
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_all_matrices_factorized_separately(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    source = source_of(family)
    roles = (
        ("q", "k", "v", "o", "up", "down") if family == "gpt2" else ("q", "k", "v", "o", "gate", "up", "down")
    )
    rewritten = compress(source, floats(roles, rank=RankRule("rank", 16), quant=INT4))
    ids = tokens(source)
    model = OnnxModel(rewritten, tmp_path)
    assert_close(model.run(ids)[0], logits(rewritten.model, ids))
    assert model.fusion("shared down-projection").found == len(roles) * source.layer_count


@pytest.mark.whole
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_multi_query_and_multi_head_attention_per_head(
    source_of: SourceOf, tmp_path: Path, kv_heads: int
) -> None:
    source = source_of("llama", num_key_value_heads=kv_heads)
    rewritten = compress(source, floats(("qk",), qk="per-head", rank=RankRule("rank", 8)))
    ids = tokens(source)
    model = OnnxModel(rewritten, tmp_path)
    assert_close(model.run(ids)[0], logits(rewritten.model, ids))
    assert model.fusion("shared down-projection").found == kv_heads * source.layer_count


TABLES = [QuantSpec(8, 128), QuantSpec(4, 16, symmetric=False), QuantSpec(2, 256)]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("family", "spec"),
    [*(("llama", spec) for spec in TABLES), ("gemma3", TABLES[0])],
    ids=lambda choice: choice if isinstance(choice, str) else f"{choice.bits}-{choice.block_size}",
)
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_tables(
    source_of: SourceOf, tmp_path: Path, spec: QuantSpec, tied: bool, family: str
) -> None:
    """Blocks wider than the hidden size too; a tied table stands once in the file."""
    source = source_of(family, tie_word_embeddings=tied)
    rewritten = compress(source, floats(quant=spec, table=spec))
    ids = tokens(source)
    model = OnnxModel(rewritten, tmp_path)
    assert_close(model.run(ids)[0], logits(rewritten.model, ids))
    shapes = [
        value.shape for name, value in model.graph.graph.initializers.items() if name.endswith(".codes")
    ]
    assert sum(shape is not None and shape[0] == 160 for shape in shapes) == (1 if tied else 2)


@pytest.mark.whole
def test_a_mixed_plan_exports(source_of: SourceOf, tmp_path: Path) -> None:
    """A plan edited by hand: other bits for one matrix, one layer left in floats."""
    source = source_of("llama")
    plan = decide_plan(source, floats(("qk",), rank=RankRule("rank", 16), quant=INT4))
    sites = []
    for site in plan.sites:
        quant = (
            None
            if site.layer == 1
            else QuantSpec(8, 32, symmetric=False)
            if site.members == ("gate",)
            else INT4
        )
        sites.append(replace(site, quant=quant))
    rewritten = rewrite(source, replace(plan, sites=tuple(sites)))
    ids = tokens(source)
    model = OnnxModel(rewritten, tmp_path)
    assert_close(model.run(ids)[0], logits(rewritten.model, ids))


@pytest.mark.whole
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_last_position_only(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    source = source_of(family)
    rewritten = compress(source, floats(quant=INT4, table=QuantSpec(8, 16)))
    model, ids = OnnxModel(rewritten, tmp_path), tokens(source)
    everything, _ = model.run(ids)
    last, _ = model.run(ids, logits_start=np.array([-1]))
    assert_close(last, everything[:, -1:])
    assert_close(model.run(ids, logits_start=np.array([9]))[0], everything[:, 9:])


@pytest.mark.whole
def test_the_accuracy_level_of_the_plan_reaches_every_node(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    for level in (0, 4):
        rewritten = compress(source, floats(quant=INT4, table=QuantSpec(8, 16), accuracy_level=level))
        graph, _ = build_graph(rewritten)
        nodes = [node for node in graph.graph if node.op_type == "MatMulNBits"]
        assert nodes
        assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {level}


@pytest.mark.whole
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_half_precision_graphs_run_on_cpu(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    """The portable graph in the bound of tier c for fp16; the cuda graph has the same operators and types."""
    source = source_of(family)
    options = floats(("qk",), rank=RankRule("rank", 16), quant=INT4, table=QuantSpec(8, 16), ep="portable")
    rewritten = compress(source, options)
    model, ids = OnnxModel(rewritten, tmp_path), tokens(source)
    actual, expected = model.run(ids)[0], logits(rewritten.model, ids)
    assert actual.dtype == torch.float16
    assert float((actual.float() - expected).abs().max()) <= 5e-3 * float(expected.abs().max())
    assert float_types(model.graph) == {ir.DataType.FLOAT16}
    other = compress(source, replace(options, target=replace(options.target, ep="cuda")))
    cuda, _ = build_graph(other)
    assert float_types(cuda) == {ir.DataType.FLOAT16}
    assert [node.op_type for node in cuda.graph] == [node.op_type for node in model.graph.graph]


def float_types(model: ir.Model) -> set[ir.DataType]:
    # Rotary frequencies stay in fp32: angles in half precision are no angles.
    values = [value for name, value in model.graph.initializers.items() if not name.endswith("frequencies")]
    types = {value.dtype for value in values if value.dtype is not None}
    return {dtype for dtype in types if dtype.is_floating_point()}
