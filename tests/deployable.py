"""A graph with a bundle's kind of inputs that is never run, and a folder that passes for a bundle."""

from __future__ import annotations

from pathlib import Path

import onnx

from rk_export.manifest import write_manifest


def write_graph(folder: Path, kind: str = "FLOAT") -> None:
    """Write model.onnx with one external tensor; `kind` is the type of keys and values."""
    make, floats = onnx.helper.make_tensor_value_info, onnx.TensorProto.DataType.Value(kind)
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [256], bytes(1024), raw=True)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"])],
        "g",
        [
            make("input_ids", onnx.TensorProto.INT64, ["batch", "length"]),
            make("past_key_values.0.key", floats, ["batch", 2, "past", 16]),
        ],
        [make("present.0.key", floats, ["batch", 2, "total", 16])],
        [weight],
    )
    onnx.save_model(
        onnx.helper.make_model(graph),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=100,
    )


def write_deployable(folder: Path, ep: str = "cpu") -> Path:
    """Write a graph and its manifest, and return the folder."""
    folder.mkdir()
    write_graph(folder)
    write_manifest(folder, {"ep": ep})
    return folder
