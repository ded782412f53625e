"""Mixtures in one QMoE node: exact in every format that it takes, alike in company, and the reason where it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from bundle_tokens import answers
from compressed import OnnxModel, SourceOf, compress, floats, logits, tokens
from genai_tokens import genai_tokens
from made_recipes import made_recipe
from onnxscript._internal.builder import GraphBuilder
from tiny_models import tiny_model
from torch import Tensor
from torch.nn.functional import silu

from rk_export import compress as whole_compress
from rk_export.graph.modules.bound import bind_weights
from rk_export.graph.modules.experts import GroupedExperts
from rk_export.model.canonical import ExpertMLP, Experts
from rk_export.model.grouped_experts import matrices_of, needs_company
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.run import Run
from rk_export.passes.graph.nodes import Mark
from rk_export.passes.modules.quantized import QuantizedLinear, float_inputs, level4_inputs
from rk_export.passes.numerics.quantize import quantize_rtn
from rk_export.planning.fixed_parts import graph_bytes
from rk_export.planning.planner import decide_plan
from rk_export.report.records import Outcome
from rk_export.rewrite.accuracy_levels import choose_levels
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.rewrite.expert_groups import experts_by_layer, with_expert_findings
from rk_export.rewrite.sizes import model_bytes, planned_bytes
from rk_export.runtime.providers import SessionSettings, open_session
from rk_export.source.stored import StoredModel

pytestmark = pytest.mark.whole

BOUND = 3e-5  # of the largest logit; float32 alone loses 1e-5 in the widest of these models
INT4, INT8 = QuantSpec(4, 32), QuantSpec(8, 32)
WIDE = {"hidden_size": 256, "intermediate_size": 256}
FORMATS = {
    "int4": INT4,
    "int4-asymmetric": QuantSpec(4, 32, symmetric=False),
    "int4-small-blocks": QuantSpec(4, 16),
    "int4-large-blocks": QuantSpec(4, 128, symmetric=False),
    "int8": INT8,
    "int8-asymmetric": QuantSpec(8, 64, symmetric=False),
}


def made(source: StoredModel, quant: QuantSpec | None, *, level: int = 4, **options: Any) -> Rewritten:
    """Compress a model without looking at its numbers; all tables stay in floats."""
    recipe = floats((), **{"quant": quant, "accuracy_level": level, **options})
    return compress(source, recipe)


def operators(model: OnnxModel) -> list[str]:
    return [node.op_type for node in model.graph.graph]


def at_level_0(model: OnnxModel) -> OnnxModel:
    """Let an exported graph read floats, as the parity tiers do."""
    exact = copy.copy(model)
    settings = SessionSettings("cpu", threads=1, accuracy_level=0)
    exact.__dict__["session"] = open_session(model.folder / "model.onnx", settings)
    return exact


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_the_chosen_experts_give_what_pytorch_gives(
    source_of: SourceOf, tmp_path: Path, spec: QuantSpec
) -> None:
    source = source_of("mixtral", **WIDE)
    rewritten, ids = made(source, spec), tokens(source)
    shipped = OnnxModel(rewritten, tmp_path)
    assert operators(shipped).count("QMoE") == source.layer_count
    assert shipped.fusion("grouped experts").found == source.layer_count
    exact, _ = at_level_0(shipped).run(ids)
    expected = logits(rewritten.model, ids)
    assert error(exact, expected) < BOUND
    with level4_inputs(rewritten.model):
        rounded = logits(rewritten.model, ids)
    lost = error(rounded, expected)
    assert lost > 100 * BOUND, "rounding the inputs is visible"
    assert error(shipped.run(ids)[0], exact) < 2 * lost


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "granitemoeshared", "phimoe"])
def test_every_router_and_shared_expert(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    widths = {"qwen2_moe": {"moe_intermediate_size": 64}, "olmoe": {"intermediate_size": 64}}
    source = source_of(family, **widths.get(family, {}))
    rewritten, ids = made(source, INT4, level=0), tokens(source)
    model = OnnxModel(rewritten, tmp_path)
    mixtures = sum(layer.has_experts for layer in source.description.decoder.layers)
    assert operators(model).count("QMoE") == mixtures > 0
    assert error(model.run(ids)[0], logits(rewritten.model, ids)) < BOUND


def test_every_expert_gives_the_same_within_the_rounding_of_inputs(
    source_of: SourceOf, tmp_path: Path
) -> None:
    """As shipped, the node and the graph that computes all experts differ as two roundings of one input do."""
    source = source_of("mixtral", **WIDE)
    rewritten, ids = made(source, INT4), tokens(source)
    grouped = OnnxModel(rewritten, _folder(tmp_path, "grouped")).run(ids)[0]
    every = OnnxModel(rewritten, _folder(tmp_path, "every"), group_experts=False)
    assert "QMoE" not in operators(every)
    expected = logits(rewritten.model, ids)
    with level4_inputs(rewritten.model):
        lost = error(logits(rewritten.model, ids), expected)
    assert error(every.run(ids)[0], grouped) < lost


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def experts_alone(spec: QuantSpec, per_token: int = 4, count: int = 8) -> ort.InferenceSession:
    """Return a session that computes random experts: hidden states, weights and numbers to what they add."""
    torch.manual_seed(0)
    experts = Experts(
        ExpertMLP(matrix(256, 512, spec), matrix(256, 512, spec), matrix(512, 256, spec), act_fn=silu)
        for _ in range(count)
    )
    module = GroupedExperts(experts, per_token, Mark("layers.0.experts", "experts"), 4, on_cpu=True)
    bind_weights(module)
    float_type, int_type = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
    shapes = {"hidden": ("rows", 1, 512), "weights": ("rows", 1, per_token), "chosen": ("rows", 1, per_token)}
    inputs = [
        ir.Value(name=name, shape=ir.Shape(shape), type=int_type if name == "chosen" else float_type)
        for name, shape in shapes.items()
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="experts")
    output = module(GraphBuilder(graph).op, *inputs)
    output.type = float_type
    graph.outputs.append(output)
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def matrix(rows: int, columns: int, spec: QuantSpec) -> Any:
    return QuantizedLinear(quantize_rtn(torch.randn(rows, columns) / columns**0.5, spec))


@pytest.mark.parametrize("spec", [INT4, QuantSpec(4, 128, symmetric=False), INT8, QuantSpec(8, 128)], ids=str)
def test_a_row_is_computed_alike_alone_and_in_company(spec: QuantSpec) -> None:
    """To the bit: sums over experts have one order, and rows that kernels take in pairs come twice."""
    session, generator = experts_alone(spec), np.random.default_rng(0)
    hidden = generator.standard_normal((40, 1, 512), dtype=np.float32)
    chosen = np.stack([generator.permutation(8)[None, :4] for _ in hidden])
    weights = generator.random((40, 1, 4), dtype=np.float32)

    def run(rows: slice) -> np.ndarray:
        feed = {"hidden": hidden[rows], "weights": weights[rows], "chosen": chosen[rows]}
        result: np.ndarray = session.run(None, feed)[0]
        return result

    alone = np.concatenate([run(slice(row, row + 1)) for row in range(len(hidden))])
    for company in (2, 3, 7, 16, len(hidden)):
        np.testing.assert_array_equal(run(slice(0, company)), alone[:company])


def test_pairs_are_needed_where_the_kernels_say_so() -> None:
    """Blocks up to 32 of 4 bits and up to 64 of 8 bits at level 4 run every row by one path."""
    assert not needs_company(INT4, 4)
    assert not needs_company(QuantSpec(8, 64), 4)
    assert needs_company(INT4, 1)
    assert needs_company(QuantSpec(4, 64), 4)
    assert needs_company(QuantSpec(8, 128), 4)


REASONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "floats": ({"quant": None}, {}, "not all of its experts are plain INT4 or INT8"),
    "w8a8": ({"quant": W8A8}, {}, "not all of its experts are plain INT4 or INT8"),
    "corrected": ({"quant": INT4, "correction": 4}, {}, "not all of its experts are plain INT4 or INT8"),
    "2 bits": ({"quant": QuantSpec(2, 32)}, {}, "rounds 2-bit experts otherwise"),
    "gelu": ({"quant": INT4}, {"hidden_act": "gelu"}, "for SiLU, not for gelu"),
    "width": ({"quant": INT4}, {"intermediate_size": 48}, "blocks of 32 columns do not fill the 48 columns"),
    "one block": ({"quant": QuantSpec(4, 64, symmetric=False)}, {}, "zero points of one block a row"),
    "float inputs": ({"quant": INT8, "level": 0}, {}, "inputs of 8-bit experts to int8"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_reason_is_told_where_every_expert_computes(
    source_of: SourceOf, tmp_path: Path, case: str
) -> None:
    options, fields, reason = REASONS[case]
    source = source_of("mixtral", num_hidden_layers=1, **fields)
    rewritten = with_expert_findings(made(source, **options))
    (finding,) = [
        item for item in rewritten.findings if (item.details or {}).get("pass") == "grouped experts"
    ]
    assert (finding.target, finding.outcome) == ("layers.0.experts", Outcome.SKIPPED)
    assert reason in finding.reason
    model, ids = OnnxModel(rewritten, tmp_path), tokens(source)
    assert "QMoE" not in operators(model)
    with float_inputs(rewritten.model):
        expected = logits(rewritten.model, ids)
    assert error(at_level_0(model).run(ids)[0], expected) < BOUND


def test_experts_of_several_formats_or_levels_stay_apart(source_of: SourceOf) -> None:
    rewritten = made(source_of("mixtral"), INT4)
    ((_, first), (_, second)) = experts_by_layer(rewritten)
    first[0].down_proj = matrix(64, 128, QuantSpec(4, 64))
    second[1].up_proj.reads_floats = True
    told = [
        item.reason for item in with_expert_findings(rewritten).findings if (item.details or {}).get("pass")
    ]
    assert "its experts have several formats" in told[-2]
    assert "its experts read their inputs at several accuracy levels" in told[-1]


def test_one_node_has_one_accuracy_level(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that the probe does not reach follow the others of their layer."""
    source = source_of("mixtral", num_local_experts=8)
    probe = tokens(source, batch=1, length=3)
    monkeypatch.setattr("rk_export.rewrite.accuracy_levels.LARGEST_LOSS", 0.0)
    rewritten = choose_levels(made(source, INT4, table=INT8), probe)
    for _, experts in experts_by_layer(rewritten):
        assert all(matrix.reads_floats for matrix in matrices_of(experts))
    findings = with_expert_findings(rewritten).findings
    assert findings[-1].reason == "the chosen experts alone compute a token"


def test_planned_bytes_are_those_of_the_tensors(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("qwen2_moe", moe_intermediate_size=64)
    recipe = made_recipe(quant=INT4, table=INT8, quantizer="rtn", prepare=(), calibration=UNWEIGHED)
    plan = decide_plan(source, recipe)
    rewritten = rewrite(source, plan)
    OnnxModel(rewritten, tmp_path)
    planned, held = planned_bytes(source, plan), model_bytes(rewritten.model, 4)
    assert abs(planned - held) < 0.005 * held
    files = sum((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert planned < files < planned + graph_bytes(source.description)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_same_node_in_half_precision(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    """Graphs for CUDA and for both hold it in fp16, with raw weights, and without rows that come twice."""
    source = source_of(family, moe_intermediate_size=64) if family == "qwen2_moe" else source_of(family)
    rewritten, ids = made(source, INT4, level=0, ep="portable"), tokens(source)
    model = OnnxModel(rewritten, tmp_path)
    nodes = [node for node in model.graph.graph if node.op_type == "QMoE"]
    assert nodes
    for node in nodes:
        assert node.attributes["weights_prepacked"].as_int() == 0
        assert node.inputs[3].dtype is ir.DataType.FLOAT16  # type: ignore[union-attr]
    assert not any(node.op_type == "Slice" and "experts" in (node.name or "") for node in model.graph.graph)
    assert error(model.run(ids)[0].float(), logits(rewritten.model, ids)) < 0.02


@pytest.mark.parametrize("spec", [INT4, QuantSpec(4, 128, symmetric=False), INT8], ids=str)
def test_requests_in_slots_and_in_genai(
    tmp_path: Path, spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shipped: tier i finds no neighbour in any logit, and GenAI chooses the tokens of our runtime."""
    monkeypatch.setattr("rk_export.rewrite.accuracy_levels.LARGEST_LOSS", 1e9)  # random weights cost much
    tiny_model("mixtral", **WIDE).save_pretrained(tmp_path / "model")
    recipe = floats((), quant=spec, table=INT8, accuracy_level=4)
    report = whole_compress(tmp_path / "model", tmp_path / "out", recipe, run=Run(threads=1))
    tiers = {tier.tier: tier for tier in report.parity}
    assert (tiers["i"].bound, tiers["i"].max_error) == (0.0, 0.0)
    assert all(tier.passed is not False for tier in tiers.values())
    told = [item for item in report.findings if (item.details or {}).get("pass") == "grouped experts"]
    assert [item.outcome for item in told] == [Outcome.APPLIED] * 2
    prompts = [list(range(3, 3 + length)) for length in (5, 9)]
    rows = answers(tmp_path / "out", [torch.tensor(prompt) for prompt in prompts], 12)
    found = genai_tokens(tmp_path / "out", prompts, 12)
    assert found == [row.until(2, 12) for row in rows]
