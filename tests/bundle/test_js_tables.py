"""Embedding tables in plain operators give the numbers of GatherBlockQuantized, to the bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from rk_export.bundle.targets.js_tables import expand_tables

ROWS, BLOCK = 11, 16
IDS = np.array([[0, 3, 10], [7, 7, 1]], np.int64)


def model(bits: int, blocks: int, floats: type, centred: bool, **attributes: int) -> onnx.ModelProto:
    """Return a lookup in a random table; zero points are packed like the codes where there are any."""
    rng = np.random.default_rng(bits)
    parts = {
        "table": rng.integers(256, size=(ROWS, blocks * BLOCK * bits // 8)).astype(np.uint8),
        "scales": rng.standard_normal((ROWS, blocks)).astype(floats),
    }
    if not centred:
        parts["points"] = rng.integers(256, size=(ROWS, -(-blocks * bits // 8))).astype(np.uint8)
    inputs = ["table", "ids", *list(parts)[1:]]
    found = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1, **attributes}
    node = helper.make_node("GatherBlockQuantized", inputs, ["rows"], domain="com.microsoft", **found)
    kind = TensorProto.FLOAT if floats is np.float32 else TensorProto.FLOAT16
    graph = helper.make_graph(
        [node],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "n"])],
        [helper.make_tensor_value_info("rows", kind, ["b", "n", blocks * BLOCK])],
        [numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(made: onnx.ModelProto) -> np.ndarray:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    session = ort.InferenceSession(made.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"ids": IDS})[0]
    return found


@pytest.mark.parametrize("centred", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("floats", [np.float32, np.float16])
@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_same_numbers(bits: int, blocks: int, floats: type, centred: bool) -> None:
    made = model(bits, blocks, floats, centred)
    expected = run(made)
    expand_tables(made.graph)
    assert "GatherBlockQuantized" not in {node.op_type for node in made.graph.node}
    onnx.checker.check_model(made)
    found = run(made)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_other_lookups_stay() -> None:
    columns = model(8, 2, np.float32, True, gather_axis=1, quantize_axis=0)
    signed = model(8, 2, np.float32, True)
    signed.graph.initializer[0].data_type = TensorProto.INT8
    for made in (columns, signed):
        before = made.SerializeToString()
        expand_tables(made.graph)
        assert made.SerializeToString() == before
