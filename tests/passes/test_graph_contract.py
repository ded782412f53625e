"""Our graph passes under onnx-ir's contract: among the library's passes, and on models that did not come from us."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from rk_export.errors import FusionError
from rk_export.passes.graph.attention_mask import AttentionMask
from rk_export.passes.graph.base import FusionResult, GraphPass, run_graph_passes
from rk_export.passes.graph.half_scales import HalfScales
from rk_export.passes.graph.logits_start import LogitsStart
from rk_export.passes.graph.nodes import MICROSOFT, Mark, mark
from rk_export.passes.graph.packed_attention import PackedAttention
from rk_export.passes.graph.packed_projections import PackedProjections
from rk_export.passes.graph.positions import PositionsFromMask
from rk_export.passes.graph.token_scales import TokenScales
from rk_export.report.records import Fusion

PASSES: tuple[type[GraphPass[Any]], ...] = (
    PackedProjections,
    PackedAttention,
    AttentionMask,
    PositionsFromMask,
    LogitsStart,
    TokenScales,
    HalfScales,
)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 16)).astype(np.float32)


def array(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model_of(
    nodes: Sequence[onnx.NodeProto], tensors: dict[str, np.ndarray], output: str = "y", opset: int = 21
) -> ir.Model:
    """Return a model from x (tokens, 16) to one output, read from its protobuf as any other would be."""
    graph = helper.make_graph(
        list(nodes),
        "theirs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 16])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["tokens", None])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def attention_head(opset: int = 21) -> ir.Model:
    """Return one head of attention as another exporter might write it: names of its own, leftovers, no marks."""
    tensors = {f"blk.0.{part}.{kind}": array(*shape) for part in ("to_q", "to_k", "to_v") for kind, shape in
               (("w", (16, 8)), ("b", (8,)))}  # fmt: skip
    tensors["left_over"] = array(4)
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Exp", ["x"], ["nobody_reads_it"]),
    ]
    for part in ("to_q", "to_k", "to_v"):
        nodes += [
            helper.make_node(
                "MatMul", ["same", f"blk.0.{part}.w"], [f"{part}.product"], f"/blk.0/{part}/MatMul"
            ),
            helper.make_node("Add", [f"{part}.product", f"blk.0.{part}.b"], [part], f"/blk.0/{part}/Add"),
        ]
    nodes += [
        helper.make_node("Transpose", ["to_k"], ["transposed"], perm=[1, 0]),
        helper.make_node("MatMul", ["to_q", "transposed"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "to_v"], ["y"]),
    ]
    return model_of(nodes, tensors, opset=opset)


def marked(model: ir.Model) -> ir.Model:
    """Mark the projections of `attention_head`, so that they may be packed."""
    for node in model.graph:
        if node.op_type == "MatMul" and (node.name or "").startswith("/blk.0/to_"):
            mark(node.outputs[0], Mark("blk.0", str(node.name).split("/")[2].removeprefix("to_")))
    return model


def run(model: ir.Model) -> np.ndarray:
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": X})
    return np.asarray(output)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_our_passes_run_among_the_library_s_on_a_model_of_somebody_else() -> None:
    model = marked(attention_head())
    expected = run(model)
    result = ir.passes.Sequential(
        common.IdentityEliminationPass(),
        *(graph_pass() for graph_pass in PASSES),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        common.CheckerPass(),
    )(model)
    assert result.model is model
    assert result.modified
    assert ops(model) == ["MatMul", "Add", "Split", "Transpose", "MatMul", "Softmax", "MatMul"]
    assert set(model.graph.initializers) == {"blk.0.q_k_v.0", "blk.0.q_k_v.bias", "blk.0.q_k_v.sizes"}
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


def test_the_library_s_passes_run_among_ours() -> None:
    model = marked(attention_head())
    expected = run(model)
    passes = [common.IdentityEliminationPass(), PackedProjections(1), common.RemoveUnusedNodesPass()]
    assert run_graph_passes(passes, model) == (Fusion("packed projections", 1, 1),)
    assert "Exp" not in ops(model)
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


def test_a_functional_copy_leaves_the_model_alone() -> None:
    model = marked(attention_head())
    before = ops(model)
    result = ir.passes.functionalize(PackedProjections())(model)
    assert ops(model) == before
    assert "Split" in ops(result.model)


@pytest.mark.parametrize("graph_pass", PASSES)
def test_a_pass_without_a_plan_takes_what_is_there(graph_pass: type[GraphPass[Any]]) -> None:
    """Nothing of any pattern is in the unmarked model: nothing changes, and the result says so."""
    model = attention_head()
    before = ir.to_proto(model).SerializeToString()
    result = graph_pass()(model)
    assert isinstance(result, FusionResult)
    assert (result.modified, result.fusion) == (False, Fusion(graph_pass.name, 0, 0))
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("graph_pass", PASSES)
def test_a_planned_miss_is_an_error_with_the_reason_before_anything_is_changed(
    graph_pass: type[GraphPass[Any]],
) -> None:
    model = attention_head()
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(FusionError, match="planned 1, found 0") as caught:
        graph_pass(1)(model)
    assert caught.value.where == graph_pass.name
    assert graph_pass.needs in caught.value.what
    assert ir.to_proto(model).SerializeToString() == before


def test_more_than_planned_leaves_the_graph_as_it_was() -> None:
    model = marked(attention_head())
    before = ops(model)
    with pytest.raises(FusionError, match="planned 0, found 1"):
        PackedProjections(0)(model)
    assert ops(model) == before


def test_in_a_sequence_the_library_s_error_is_caused_by_ours() -> None:
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(common.IdentityEliminationPass(), PackedProjections(2))(marked(attention_head()))
    assert isinstance(caught.value.__cause__, FusionError)
    assert "planned 2, found 1" in str(caught.value.__cause__)


def test_a_rewrite_that_leaves_its_pattern_is_an_error() -> None:
    class Idle(PackedProjections):
        def rewrite(self, graph: ir.Graph, matches: Any) -> None:
            del graph, matches

    with pytest.raises(FusionError, match="left the pattern in the graph"):
        Idle(1)(marked(attention_head()))


def test_an_opset_without_the_operators_that_are_written_is_refused() -> None:
    with pytest.raises(FusionError, match=r"opset 18, the model imports 17") as caught:
        PackedProjections()(marked(attention_head(opset=17)))
    assert "version_converter" in str(caught.value)
    assert not PackedProjections()(attention_head(opset=17)).modified  # nothing to write


def nbits_with_bias() -> ir.Model:
    """Two MatMulNBits with the bias as the operator's own input, which is not stacked."""
    tensors: dict[str, np.ndarray] = {}
    nodes = []
    for part in ("q", "k"):
        tensors[f"{part}.w"] = RANDOM.integers(0, 256, (8, 1, 8), dtype=np.uint8)
        tensors[f"{part}.s"], tensors[f"{part}.b"] = array(8, 1), array(8)
        sizes = {"K": 16, "N": 8, "bits": 4, "block_size": 16}
        inputs = ["x", f"{part}.w", f"{part}.s", "", "", f"{part}.b"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [part], f"/{part}", domain=MICROSOFT, **sizes))
    return model_of([*nodes, helper.make_node("Add", ["q", "k"], ["y"])], tensors)


def scalar_bias() -> ir.Model:
    """Two MatMuls with biases of one number: a sum of that kind is nobody's bias, the products alone are packed."""
    tensors = {"q.w": array(16, 8), "k.w": array(16, 8), "q.b": array(1), "k.b": array(1)}
    nodes = []
    for part in ("q", "k"):
        nodes.append(helper.make_node("MatMul", ["x", f"{part}.w"], [f"{part}.product"], f"/{part}"))
        nodes.append(helper.make_node("Add", [f"{part}.product", f"{part}.b"], [part]))
    return model_of([*nodes, helper.make_node("Mul", ["q", "k"], ["y"])], tensors)


def output_of_the_graph() -> ir.Model:
    """Two MatMuls of which one is what the graph returns."""
    nodes = [
        helper.make_node("MatMul", ["x", "q.w"], ["y"], "/q"),
        helper.make_node("MatMul", ["x", "k.w"], ["k"], "/k"),
    ]
    return model_of(nodes, {"q.w": array(16, 8), "k.w": array(16, 8)})


@pytest.mark.parametrize(
    ("build", "found"), [(nbits_with_bias, 0), (scalar_bias, 1), (output_of_the_graph, 0)]
)
def test_products_of_somebody_else_that_do_not_stack_are_left_alone(
    build: Callable[[], ir.Model], found: int
) -> None:
    model = build()
    for node in model.graph:
        if (node.name or "").startswith("/"):
            mark(node.outputs[0], Mark("blk.0", str(node.name)[1:]))
    expected, before = run(model), ops(model)
    assert PackedProjections()(model).fusion.found == found
    assert (ops(model) == before) is (found == 0)
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


def int8_product(*more: str) -> ir.Model:
    tensors = {
        "w": RANDOM.integers(-127, 128, (16, 8), dtype=np.int8),
        "s": np.full(8, 0.01, np.float32),
        "z": np.zeros(8, np.int8),
    }
    nodes = [
        helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", *more], ["product"], domain=MICROSOFT),
        helper.make_node("Identity", ["product"], ["y"]),
    ]
    return model_of(nodes, tensors)


def test_int8_products_with_zero_points_keep_the_scale_of_all_tokens() -> None:
    model = int8_product("z")
    expected = run(model)
    assert TokenScales()(model).fusion.found == 0
    np.testing.assert_array_equal(run(model), expected)
    with pytest.raises(FusionError, match="neither zero points nor a bias"):
        TokenScales(1)(model)
    assert TokenScales(1)(int8_product()).fusion.found == 1
