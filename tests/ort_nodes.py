"""One node of ONNX Runtime's own operators, run on a quantized matrix."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import helper, numpy_helper

from rk_export.passes.graph.nodes import MICROSOFT
from rk_export.passes.numerics.quantize import QuantizedMatrix


def run_node(op_type: str, feed: np.ndarray, matrix: QuantizedMatrix, **attributes: int) -> np.ndarray:
    """Run one ``com.microsoft`` node on a quantized matrix on the CPU provider."""
    codes = matrix.codes if op_type == "MatMulNBits" else matrix.codes.flatten(1)
    stored = {"codes": codes, "scales": matrix.scales, "zero_points": matrix.zero_points}
    tensors = {name: tensor.numpy() for name, tensor in stored.items() if tensor is not None}
    order = ["x", "codes", "scales"] if op_type == "MatMulNBits" else ["codes", "x", "scales"]
    order += ["zero_points"] if "zero_points" in tensors else []
    attributes |= {"bits": matrix.spec.bits, "block_size": matrix.spec.block_size}
    node = helper.make_node(op_type, order, ["y"], domain=MICROSOFT, **attributes)
    kind = helper.np_dtype_to_tensor_dtype(feed.dtype)
    kind_out = helper.np_dtype_to_tensor_dtype(tensors["scales"].dtype)
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("x", kind, list(feed.shape))],
        [helper.make_tensor_value_info("y", kind_out, None)],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {"x": feed})[0]
    return output
