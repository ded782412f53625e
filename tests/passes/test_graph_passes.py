"""Graph passes on hand-made graphs: what they rewrite, what they must leave alone, and what a miss says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from rk_export.errors import FusionError
from rk_export.passes.graph.attention_mask import ATTENTION_BIAS, SEQLENS_K, TOTAL_LENGTH, AttentionMask
from rk_export.passes.graph.base import run_graph_passes
from rk_export.passes.graph.logits_start import LogitsStart
from rk_export.passes.graph.nodes import MICROSOFT, Mark, concatenated, constant, mark
from rk_export.passes.graph.packed_attention import PackedAttention
from rk_export.passes.graph.packed_projections import PackedProjections
from rk_export.passes.graph.positions import PositionsFromMask
from rk_export.report.records import Fusion

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Shape = Sequence[int | str]


class Graph:
    """A graph under construction, and its values in ONNX Runtime."""

    def __init__(self) -> None:
        self.graph = ir.Graph([], [], nodes=[], name="hand_made", opset_imports={"": 21, MICROSOFT: 1})
        self.model = ir.Model(self.graph, ir_version=10)
        self.random = np.random.default_rng(0)

    def input(self, name: str, shape: Shape, dtype: ir.DataType = FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        return value

    def weight(self, name: str, shape: Sequence[int]) -> ir.Value:
        return self.array(name, self.random.standard_normal(shape).astype(np.float32))

    def array(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        site: str | None = None,
        part: str = "q",
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> ir.Node:
        attrs = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        name = f"{op_type}_{len(self.graph)}"
        node = ir.Node(domain, op_type, inputs, attrs, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}_{index}"
            output.type = ir.TensorType(FLOAT)
        self.graph.append(node)
        if site is not None:
            mark(node.outputs[0], Mark(site, part))
        return node

    def nbits(self, x: ir.Value, name: str, rows: int, site: str, bits: int = 4, block: int = 16) -> ir.Value:
        """Append a MatMulNBits by a random matrix (rows, 32)."""
        blocks = 32 // block
        codes = self.random.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8)
        weights = [self.array(f"{name}.codes", codes), self.weight(f"{name}.scales", (rows, blocks))]
        attributes = {"K": 32, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 0}
        return self.node("MatMulNBits", [x, *weights], site, name, MICROSOFT, **attributes).outputs[0]

    def matmul(self, x: ir.Value, name: str, columns: int, site: str | None, bias: bool = False) -> ir.Value:
        """Append a MatMul by a random matrix (32, columns), and the Add of a bias."""
        output = self.node("MatMul", [x, self.weight(f"{name}.weight", (32, columns))], site, name).outputs[0]
        return (
            self.node("Add", [output, self.weight(f"{name}.bias", (columns,))]).outputs[0] if bias else output
        )

    def output(self, *values: ir.Value) -> None:
        self.graph.outputs.extend(values)

    def ops(self) -> list[str]:
        return [node.op_type for node in self.graph]

    def run(self, **feeds: np.ndarray) -> list[np.ndarray]:
        session = ort.InferenceSession(
            ir.to_proto(self.model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, feeds))


def assert_unchanged(graph: Graph, before: list[str]) -> None:
    assert graph.ops() == before


def pack(graph: Graph, planned: int) -> Fusion:
    (fusion,) = run_graph_passes([PackedProjections(planned)], graph.model)
    return fusion


X = np.random.default_rng(1).standard_normal((2, 3, 32)).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_matmuls_on_one_input_are_packed(bias: bool) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 32])
    outputs = [
        graph.matmul(x, name, columns, "layers.0.qk", bias)
        for name, columns in (("q", 8), ("k", 4), ("v", 6))
    ]
    graph.output(*(graph.node("Identity", [output]).outputs[0] for output in outputs))
    expected = graph.run(x=X)
    fusion = pack(graph, 1)
    assert (fusion.planned, fusion.found, fusion.reason) == (1, 1, "")
    assert graph.ops() == ["MatMul", *(["Add"] if bias else []), "Split", "Identity", "Identity", "Identity"]
    for actual, wanted in zip(graph.run(x=X), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)
    packed = graph.graph[0]
    assert packed.metadata_props["rk_export.part"] == "q_k_v"
    assert packed.inputs[1] is not None
    assert packed.inputs[1].shape == ir.Shape([32, 18])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_matmuls_are_packed(bits: int) -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 32])
    outputs = [graph.nbits(x, name, rows, "layers.0.qk", bits) for name, rows in (("q", 8), ("k", 4))]
    graph.output(*(graph.node("Identity", [output]).outputs[0] for output in outputs))
    expected = graph.run(x=X)
    assert pack(graph, 1).found == 1
    assert graph.graph[0].attributes["N"].as_int() == 12
    for actual, wanted in zip(graph.run(x=X), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_sites_with_equal_names_keep_their_weights_apart() -> None:
    """Two inputs whose projections belong to one site and part."""
    graph = Graph()
    inputs = [graph.input(name, [2, 3, 32]) for name in ("x", "y")]
    for number, value in enumerate(inputs):
        for part in ("q", "k"):
            graph.output(
                graph.node(
                    "Identity", [graph.matmul(value, f"{part}{number}", 4, f"layers.{number}.qk")]
                ).outputs[0]
            )
    expected = graph.run(x=X, y=2 * X)
    assert pack(graph, 2).found == 2
    for actual, wanted in zip(graph.run(x=X, y=2 * X), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def different_inputs(graph: Graph, x: ir.Value) -> list[ir.Value]:
    other = graph.node("Relu", [x]).outputs[0]
    return [graph.matmul(x, "q", 8, "layers.0.q"), graph.matmul(other, "k", 8, "layers.0.k")]


def different_bits(graph: Graph, x: ir.Value) -> list[ir.Value]:
    return [graph.nbits(x, "q", 8, "layers.0.q", 4), graph.nbits(x, "k", 8, "layers.0.k", 8)]


def different_blocks(graph: Graph, x: ir.Value) -> list[ir.Value]:
    return [graph.nbits(x, "q", 8, "layers.0.q", block=16), graph.nbits(x, "k", 8, "layers.0.k", block=32)]


def quantized_and_float(graph: Graph, x: ir.Value) -> list[ir.Value]:
    return [graph.nbits(x, "q", 8, "layers.0.q"), graph.matmul(x, "k", 8, "layers.0.k")]


def one_bias(graph: Graph, x: ir.Value) -> list[ir.Value]:
    return [graph.matmul(x, "q", 8, "layers.0.q", bias=True), graph.matmul(x, "k", 8, "layers.0.k")]


def computed_weight(graph: Graph, x: ir.Value) -> list[ir.Value]:
    weight = graph.node("Transpose", [graph.weight("table", (8, 32))]).outputs[0]
    return [graph.matmul(x, "q", 8, "layers.0.q"), graph.node("MatMul", [x, weight], "layers.0.k").outputs[0]]


def unmarked(graph: Graph, x: ir.Value) -> list[ir.Value]:
    return [graph.matmul(x, "q", 8, "layers.0.q"), graph.matmul(x, "router", 8, None)]


NEAR_MISSES = [
    different_inputs,
    different_bits,
    different_blocks,
    quantized_and_float,
    one_bias,
    computed_weight,
    unmarked,
]


@pytest.mark.parametrize("build", NEAR_MISSES)
def test_what_does_not_fit_is_left_alone_and_a_planned_miss_is_an_error(build: Any) -> None:
    graph = Graph()
    graph.output(
        *(graph.node("Identity", [value]).outputs[0] for value in build(graph, graph.input("x", [2, 3, 32])))
    )
    before, expected = graph.ops(), graph.run(x=X)
    assert pack(graph, 0) == Fusion("packed projections", 0, 0)
    assert_unchanged(graph, before)
    for actual, wanted in zip(graph.run(x=X), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    with pytest.raises(FusionError, match="planned 1, found 0") as caught:
        pack(graph, 1)
    assert caught.value.where == "packed projections"
    assert "several matrices of one format" in caught.value.what
    assert_unchanged(graph, before)


def test_more_than_planned_is_an_error_too() -> None:
    graph = Graph()
    x = graph.input("x", [2, 3, 32])
    values = [graph.matmul(x, "q", 8, "layers.0.q"), graph.matmul(x, "k", 8, "layers.0.k")]
    graph.output(*(graph.node("Identity", [value]).outputs[0] for value in values))
    with pytest.raises(FusionError, match="planned 0, found 1"):
        pack(graph, 0)


def test_a_sum_with_a_constant_that_is_used_twice_is_no_bias() -> None:
    """The MatMul's output has another reader, so only the product may be packed."""
    graph = Graph()
    x = graph.input("x", [2, 3, 32])
    q, k = (graph.matmul(x, name, 8, "layers.0.qk") for name in ("q", "k"))
    shifted = graph.node("Add", [q, graph.weight("shift", (8,))]).outputs[0]
    graph.output(*(graph.node("Identity", [value]).outputs[0] for value in (q, k, shifted)))
    expected = graph.run(x=X)
    assert pack(graph, 1).found == 1
    for actual, wanted in zip(graph.run(x=X), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


HEADS, KV_HEADS, WIDTH = 2, 1, 16


def attention(
    graph: Graph, order: Sequence[int] = (0, 1, 2), normed: bool = False, domain: str = MICROSOFT
) -> tuple[ir.Node, ir.Node]:
    """Append Split and GroupQueryAttention on a packed input; returns both."""
    sizes = np.array([HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH])
    packed = graph.input("packed", ["batch", "length", int(sizes.sum())])
    split = graph.node("Split", [packed, graph.array("sizes", sizes)], outputs=3, axis=-1)
    parts = [split.outputs[index] for index in order]
    if normed:
        parts[0] = graph.node("Relu", [parts[0]]).outputs[0]
    past = [
        graph.input(f"past_key_values.0.{part}", ["batch", KV_HEADS, "past", WIDTH])
        for part in ("key", "value")
    ]
    tail = [graph.array("last", np.array([2], np.int32)), graph.array("total", np.array(3, np.int32))]
    node = graph.node(
        "GroupQueryAttention",
        [*parts, *past, *tail],
        domain=domain,
        outputs=3,
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
    )
    graph.output(*node.outputs)
    return split, node


def empty_past(batch: int) -> dict[str, np.ndarray]:
    empty = np.zeros((batch, KV_HEADS, 0, WIDTH), np.float32)
    return {"past_key_values.0.key": empty, "past_key_values.0.value": empty}


def test_the_packed_projection_feeds_attention_directly() -> None:
    graph = Graph()
    _, node = attention(graph)
    feeds = {"packed": X[:1, :, :].repeat(2, axis=2), **empty_past(1)}
    expected = graph.run(**feeds)
    fusion = PackedAttention(1)(graph.model).fusion
    assert (fusion.found, fusion.reason) == (1, "")
    assert graph.ops() == ["GroupQueryAttention"]
    assert node.inputs[1] is None
    assert node.inputs[2] is None
    for actual, wanted in zip(graph.run(**feeds), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"order": (1, 0, 2)},
        {"order": (0, 2, 1)},
        {"normed": True},
        {"domain": "elsewhere"},
    ],
)
def test_attention_on_anything_else_keeps_its_split(change: dict[str, Any]) -> None:
    graph = Graph()
    attention(graph, **change)
    before = graph.ops()
    assert PackedAttention(0)(graph.model).fusion == Fusion("packed query, key and value", 0, 0)
    assert_unchanged(graph, before)
    with pytest.raises(FusionError, match="exactly q, k, v"):
        run_graph_passes([PackedAttention(1)], graph.model)


def test_a_split_that_somebody_else_reads_stays() -> None:
    graph = Graph()
    split, _ = attention(graph)
    graph.output(graph.node("Identity", [split.outputs[0]]).outputs[0])
    before = graph.ops()
    assert PackedAttention()(graph.model).fusion.found == 0
    assert_unchanged(graph, before)
    with pytest.raises(FusionError, match="exactly q, k, v"):
        PackedAttention(1)(graph.model)


def masked_graph() -> tuple[Graph, ir.Node]:
    graph = Graph()
    graph.input("input_ids", ["batch", "length"], INT64)
    graph.input("attention_mask", ["batch", "total"], INT64)
    return graph, attention(graph)[1]


def test_left_padding_is_masked_out() -> None:
    graph, node = masked_graph()
    (fusion,) = run_graph_passes([AttentionMask(1)], graph.model)
    assert (fusion.planned, fusion.found) == (1, 1)
    assert all(node.inputs[slot] is not None for slot in (SEQLENS_K, TOTAL_LENGTH, ATTENTION_BIAS))
    values = X.repeat(2, axis=2)
    padded = np.concatenate([np.full((2, 2, 64), 7, np.float32), values], axis=1)
    mask = np.array([[0, 0, 1, 1, 1]] * 2)
    ids = np.zeros((2, 5), np.int64)
    output = graph.run(input_ids=ids, attention_mask=mask, packed=padded, **empty_past(2))[0]
    for row in range(2):
        feeds = {"input_ids": ids[:1, :3], "attention_mask": mask[:1, 2:], "packed": values[row : row + 1]}
        single = graph.run(**feeds, **empty_past(1))[0]
        np.testing.assert_allclose(output[row, 2:], single[0], rtol=1e-5, atol=1e-6)
    unmasked = graph.run(input_ids=ids, attention_mask=np.ones_like(mask), packed=padded, **empty_past(2))[0]
    assert np.abs(unmasked[:, 2:] - output[:, 2:]).max() > 1e-2


def test_an_attention_of_another_operator_is_a_miss() -> None:
    graph = Graph()
    graph.input("input_ids", ["batch", "length"], INT64)
    graph.input("attention_mask", ["batch", "total"], INT64)
    attention(graph, domain="elsewhere")
    before = graph.ops()
    with pytest.raises(FusionError, match="an attention layer must be GroupQueryAttention"):
        run_graph_passes([AttentionMask(1)], graph.model)
    assert_unchanged(graph, before)


def test_the_mask_is_added_to_a_bias_of_attention() -> None:
    """A bias that hides the first key is what a mask without that key says; both together hide both."""
    graph, node = masked_graph()
    bias = graph.input("bias", ["batch", 1, "length", "total"])
    node.resize_inputs(ATTENTION_BIAS + 1)
    node.replace_input_with(ATTENTION_BIAS, bias)
    run_graph_passes([AttentionMask(1)], graph.model)
    values = X.repeat(2, axis=2)[:1]
    values = np.concatenate([values, values[:, ::-1] * 2], axis=1)  # six tokens
    hidden = np.zeros((1, 1, 6, 6), np.float32)
    hidden[..., 0] = -1e9

    def last(mask: list[int], own: np.ndarray) -> np.ndarray:
        feeds = {
            "input_ids": np.zeros((1, 6), np.int64),
            "attention_mask": np.array([mask]),
            "packed": values,
        }
        found: np.ndarray = graph.run(**feeds, bias=own, **empty_past(1))[0][0, -1]
        return found

    both = last([0, 0, 1, 1, 1, 1], np.zeros_like(hidden))
    np.testing.assert_allclose(last([1, 0, 1, 1, 1, 1], hidden), both, rtol=1e-5, atol=1e-6)
    assert np.abs(last([1, 0, 1, 1, 1, 1], np.zeros_like(hidden)) - both).max() > 1e-3


def test_a_mask_is_not_added_twice() -> None:
    graph, _ = masked_graph()
    run_graph_passes([AttentionMask(1)], graph.model)
    before = graph.ops()
    with pytest.raises(FusionError, match="without the mask in its bias"):
        AttentionMask(1)(graph.model)
    assert_unchanged(graph, before)


def test_a_graph_without_a_mask_is_a_miss() -> None:
    graph = Graph()
    attention(graph)
    with pytest.raises(FusionError, match="inputs input_ids and attention_mask"):
        AttentionMask(1)(graph.model)


def positions_graph(used: bool = True) -> Graph:
    graph = Graph()
    graph.input("input_ids", ["batch", "length"], INT64)
    graph.input("attention_mask", ["batch", "total"], INT64)
    positions = graph.input("position_ids", ["batch", "length"], INT64)
    source = positions if used else graph.graph.inputs[0]
    output = graph.node("Identity", [source]).outputs[0]
    output.type = ir.TensorType(INT64)
    graph.output(output)
    return graph


@pytest.mark.parametrize(
    ("mask", "length", "expected"),
    [
        ([[1, 1, 1, 1]], 4, [[0, 1, 2, 3]]),
        ([[0, 0, 1, 1], [1, 1, 1, 1]], 4, [[0, 0, 0, 1], [0, 1, 2, 3]]),
        ([[0, 0, 1, 1], [1, 1, 1, 1]], 1, [[1], [3]]),
        ([[0, 1, 1, 1, 1]], 2, [[2, 3]]),
    ],
)
def test_positions_count_the_attended_tokens(
    mask: list[list[int]], length: int, expected: list[list[int]]
) -> None:
    graph = positions_graph()
    (fusion,) = run_graph_passes([PositionsFromMask(1)], graph.model)
    assert fusion.found == 1
    assert [value.name for value in graph.graph.inputs] == ["input_ids", "attention_mask"]
    ids = np.zeros((len(mask), length), np.int64)
    np.testing.assert_array_equal(graph.run(input_ids=ids, attention_mask=np.array(mask))[0], expected)


def test_unused_positions_are_dropped_and_a_planned_miss_is_an_error() -> None:
    graph = positions_graph(used=False)
    assert PositionsFromMask(0)(graph.model).fusion == Fusion("positions from the mask", 0, 0)
    assert [value.name for value in graph.graph.inputs] == ["input_ids", "attention_mask"]
    assert graph.ops() == ["Identity"]
    with pytest.raises(FusionError, match="the graph uses no position_ids"):
        run_graph_passes([PositionsFromMask(1)], graph.model)


def test_logits_start_defaults_to_every_position() -> None:
    graph = Graph()
    hidden = graph.input("hidden", ["batch", "length", 32])
    graph.output(graph.matmul(hidden, "lm_head", 5, "lm_head"))
    (everything,) = graph.run(hidden=X)
    (fusion,) = run_graph_passes([LogitsStart(1)], graph.model)
    assert fusion.found == 1
    assert graph.ops() == ["Slice", "MatMul"]
    np.testing.assert_array_equal(graph.run(hidden=X)[0], everything)
    for start, rows in ((-1, slice(2, 3)), (-2, slice(1, 3)), (1, slice(1, 3)), (0, slice(0, 3))):
        (some,) = graph.run(hidden=X, logits_start=np.array([start]))
        np.testing.assert_allclose(some, everything[:, rows], rtol=1e-6)


def test_a_graph_without_a_marked_head_is_a_miss() -> None:
    graph = Graph()
    graph.output(graph.matmul(graph.input("hidden", ["batch", "length", 32]), "other", 5, "layers.0.q"))
    assert LogitsStart(0)(graph.model).fusion.found == 0
    with pytest.raises(FusionError, match="no node is marked as lm_head"):
        run_graph_passes([LogitsStart(1)], graph.model)
    assert graph.ops() == ["MatMul"]


def test_joined_initializers_are_read_when_they_are_written() -> None:
    graph = Graph()
    values = [graph.weight(name, (4, columns)) for name, columns in (("a", 3), ("b", 2))]
    joined = concatenated(values, 1, "joined")
    assert joined.shape == ir.Shape([4, 5])
    assert joined.const_value is not None
    arrays = [value.const_value.numpy() for value in values if value.const_value is not None]
    np.testing.assert_array_equal(joined.const_value.numpy(), np.concatenate(arrays, axis=1))
    with pytest.raises(TypeError, match="empty has no values yet"):
        concatenated([ir.Value(name="empty", shape=ir.Shape([1]), type=ir.TensorType(FLOAT))], 0, "joined")


def test_constants_of_one_name_are_shared() -> None:
    graph = Graph()
    one = constant(graph.graph, "one", np.array([1]))
    assert constant(graph.graph, "one", np.array([1])) is one
    assert list(graph.graph.initializers) == ["one"]


def test_an_input_cannot_be_marked() -> None:
    with pytest.raises(TypeError, match="produced by no node"):
        mark(Graph().input("x", [1]), Mark("layers.0.q", "q"))
