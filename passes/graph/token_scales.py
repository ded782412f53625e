"""Int8 products whose tokens are quantized one by one: each DynamicQuantizeMatMul becomes

    peak = max|x|;  codes = QuantizeLinear(x / peak, 1/127);  y = MatMulIntegerToFloat(codes, W) * peak

DynamicQuantizeMatMul takes one scale for all tokens of a batch: one token with huge values (attention sinks) then
rounds the others away, and what a token computes depends on its neighbours, cached or not. The inputs are uint8
about 128 and the weights int8: the one pairing that ONNX Runtime multiplies fast on x86-64.

Where many tokens run at once, as in encoders, memory decides: the inputs are then divided and rounded in one pass over
them, by a QuantizeLinear that has one step for each row. It takes a few more nodes, which one token alone would feel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.base import GraphPass
from rk_export.passes.graph.nodes import MICROSOFT, constant
from rk_export.passes.graph.packing import INT8_PRODUCT
from rk_export.passes.numerics.int8 import SMALLEST_PEAK, STEP

Codes = tuple[ir.Value, ir.Value]


class TokenScales(GraphPass[ir.Node]):
    """Quantize the input of int8 products token by token; products that read one value share its codes."""

    name = "int8 products"
    needs = (
        "a DynamicQuantizeMatMul must have signed weights, their scales, and neither zero points nor a bias"
    )

    def __init__(self, planned: int | None = None, *, many: bool = False) -> None:
        """Take the planned number of products, and whether many tokens run at once as a rule."""
        super().__init__(planned)
        self._many = many

    def matches(self, graph: ir.Graph) -> Sequence[ir.Node]:
        """Return the products, those that are left after packing."""
        return [node for node in graph if _is_symmetric(node)]

    def rewrite(self, graph: ir.Graph, matches: Sequence[ir.Node]) -> None:
        codes: dict[ir.Value, Codes] = {}
        for node in matches:
            x = node.inputs[0]
            assert x is not None  # the operator requires it
            if x not in codes:
                codes[x] = (_quantize_rows if self._many else _quantize)(graph, node, x)
            _multiply(graph, node, *codes[x])


def _is_symmetric(node: ir.Node) -> bool:
    if node.op_type != INT8_PRODUCT or node.domain != MICROSOFT or node.outputs[0].is_graph_output():
        return False
    _, weights, _, *others = node.inputs
    return weights is not None and weights.dtype is ir.DataType.INT8 and not any(others)


def _quantize(graph: ir.Graph, node: ir.Node, x: ir.Value) -> Codes:
    """Insert, in front of a product, the nodes that return the codes of x (..., K) and its peaks (..., 1)."""
    last = constant(graph, "rk.last_axis", np.array([-1], dtype=np.int64))
    smallest = constant(graph, "rk.smallest_peak", np.array(SMALLEST_PEAK, dtype=np.float32))
    name = f"{node.name}.tokens"
    size = ir.Node("", "Abs", [x], name=f"{name}.abs")
    largest = ir.Node(
        "", "ReduceMax", [size.outputs[0], last], [ir.AttrInt64("keepdims", 1)], name=f"{name}.max"
    )
    peak = ir.Node("", "Max", [largest.outputs[0], smallest], name=f"{name}.peak")
    unit = ir.Node("", "Div", [x, peak.outputs[0]], name=f"{name}.unit")
    codes = ir.Node("", "QuantizeLinear", [unit.outputs[0], *_grid(graph)], name=f"{name}.codes")
    graph.insert_before(node, [size, largest, peak, unit, codes])
    return codes.outputs[0], peak.outputs[0]


def _quantize_rows(graph: ir.Graph, node: ir.Node, x: ir.Value) -> Codes:
    """Do the same as `_quantize` with one pass over x for its peaks, and one for its codes."""
    weights = node.inputs[1]
    assert weights is not None
    assert weights.shape is not None
    last = constant(graph, "rk.last_axis", np.array([-1], dtype=np.int64))
    smallest = constant(graph, "rk.smallest_peak", np.array(SMALLEST_PEAK, dtype=np.float32))
    width = int(weights.shape.numpy()[0])
    rows = constant(graph, f"rk.rows_of_{width}", np.array([-1, width], dtype=np.int64))
    step, _ = _grid(graph)
    name, new = f"{node.name}.tokens", list[ir.Node]()

    def emit(op_type: str, part: str, *inputs: ir.Value, **attributes: int | ir.TensorProtocol) -> ir.Value:
        new.append(ir.node(op_type, inputs, attributes, name=f"{name}.{part}"))
        return new[-1].outputs[0]

    largest = emit("ReduceMax", "max", x, last, keepdims=1)
    negative = emit("Neg", "negative", emit("ReduceMin", "min", x, last, keepdims=1))
    peak = emit("Max", "peak", largest, negative, smallest)
    steps = emit("Reshape", "steps", emit("Mul", "step", peak, step), last)
    zero = ir.tensor(np.array([128], np.uint8))
    zeros = emit("ConstantOfShape", "zeros", emit("Shape", "count", steps), value=zero)
    flat = emit("Reshape", "rows", x, rows)
    codes = emit("QuantizeLinear", "codes", flat, steps, zeros, axis=0)
    whole = emit("Reshape", "whole", codes, emit("Shape", "shape", x))
    graph.insert_before(node, new)
    return whole, peak


def _grid(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Return the step and the zero point of the codes."""
    return (
        constant(graph, "rk.int8_step", np.array(STEP, dtype=np.float32)),
        constant(graph, "rk.int8_zero", np.array(128, dtype=np.uint8)),
    )


def _multiply(graph: ir.Graph, node: ir.Node, codes: ir.Value, peak: ir.Value) -> None:
    """Put the product by codes in the place of a DynamicQuantizeMatMul."""
    weights, scales = node.inputs[1:3]
    step, zero = _grid(graph)
    product = ir.Node(
        MICROSOFT, "MatMulIntegerToFloat", [codes, weights, step, scales, zero], name=f"{node.name}.product"
    )
    product.metadata_props.update(node.metadata_props)
    scaled = ir.Node("", "Mul", [product.outputs[0], peak], name=f"{node.name}.scaled")
    old, new = node.outputs[0], scaled.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, [product, scaled])
    ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)
