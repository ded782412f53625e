"""LayerNorms apart from the sums in front of them: the same numbers, also of the sum itself, and the graph's names."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from rk_export.passes.graph.base import run_graph_passes
from rk_export.passes.graph.sums_apart import SumsApart

WIDTH = 8


def graph(*, bias: bool, sums: bool) -> ir.Model:
    """Return a SkipLayerNormalization on inputs, with the sum as a second output where it is wanted."""
    shape = ["batch", "length", WIDTH]
    inputs = [ir.val(name, ir.DataType.FLOAT, shape) for name in ("states", "residual")]
    inputs += [ir.val(name, ir.DataType.FLOAT, [WIDTH]) for name in ("gain", "shift")]
    inputs += [ir.val("bias", ir.DataType.FLOAT, [WIDTH])] if bias else []
    node = ir.node(
        "SkipLayerNormalization",
        inputs,
        {"epsilon": 1e-3},
        domain="com.microsoft",
        num_outputs=4,
        name="norm",
    )
    outputs = [node.outputs[0], *([node.outputs[3]] if sums else [])]
    for name, output in zip(("normed", "sum"), outputs, strict=False):
        output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    opsets = {"": 21, "com.microsoft": 1}
    return ir.Model(ir.Graph(inputs, outputs, nodes=[node], opset_imports=opsets, name="g"), ir_version=10)


def answers(model: ir.Model, feeds: dict[str, Any]) -> list[np.ndarray]:
    serialized = ir.to_proto(model).SerializeToString()
    found = ort.InferenceSession(serialized, providers=["CPUExecutionProvider"]).run(None, feeds)
    return [np.asarray(value) for value in found]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sums", [False, True])
def test_the_numbers_stay(bias: bool, sums: bool) -> None:
    generator = np.random.default_rng(0)
    model = graph(bias=bias, sums=sums)
    feeds = {
        value.name: generator.standard_normal((2, 3, WIDTH) if len(value.shape) == 3 else WIDTH).astype(
            np.float32
        )
        for value in model.graph.inputs
    }
    before = answers(model, feeds)
    run_graph_passes([SumsApart(1)], model)
    assert [node.op_type for node in model.graph] == ["Sum", "LayerNormalization"]
    assert [value.name for value in model.graph.outputs] == ["normed", "sum"][: 1 + sums]
    for found, expected in zip(answers(model, feeds), before, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_outputs_for_training_are_left_alone() -> None:
    model = graph(bias=False, sums=False)
    (node,) = model.graph
    mean = node.outputs[1]
    mean.name, mean.type, mean.shape = "mean", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "l", 1])
    model.graph.outputs.append(mean)
    run_graph_passes([SumsApart(0)], model)
    assert [one.op_type for one in model.graph] == ["SkipLayerNormalization"]
