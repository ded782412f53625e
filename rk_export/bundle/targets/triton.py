"""Triton model repository of a bundle, for the onnxruntime backend."""

from __future__ import annotations

from pathlib import Path

import onnx

from rk_export.bundle.targets.base import Deployment, Target
from rk_export.bundle.targets.links import link_or_copy
from rk_export.errors import InputError

_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
}
_MAX_BATCH_SIZE = 8  # requests of equal shape that the server may join
_CUDA = """\
optimization {
  execution_accelerators {
    gpu_execution_accelerator: [
      {
        name: "cuda"
      }
    ]
  }
}
"""


def write_repository(deployment: Deployment, folder: Path) -> None:
    """Write ``NAME/`` into a folder; Triton is then started with ``--model-repository`` of that folder.

    The graph and its external data appear as hard links in a directory called ``model.onnx``, the form Triton
    takes for models of several files; they are copied where the file system has no hard links.

    Args:
        deployment: The bundle and the name of the served model.
        folder: The model repository, an empty folder.

    Raises:
        InputError: The bundle has no ``model.onnx``, or an input or output type has no counterpart in Triton.
    """
    bundle = deployment.bundle
    if not (bundle / "model.onnx").is_file():
        raise InputError("model.onnx is missing", where=str(bundle), fix="export the bundle again")
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    files = {"model.onnx"} | {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    text = _config(graph, deployment.name, deployment.ep)
    place = folder / deployment.name
    model = place / "1" / "model.onnx"
    for file in sorted(files):
        link_or_copy(bundle / file, model / file)
    (place / "config.pbtxt").write_text(text, encoding="utf-8")


def _config(graph: onnx.GraphProto, name: str, ep: str) -> str:
    # The server counts the inputs of the session, and an initializer that may be overridden is none of them.
    optional = {tensor.name for tensor in graph.initializer}
    required = [value for value in graph.input if value.name not in optional]
    tensors = [_tensor("input", v) for v in required] + [_tensor("output", v) for v in graph.output]
    kind = "KIND_GPU" if ep == "cuda" else "KIND_CPU"
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {_MAX_BATCH_SIZE}\n'
        + "".join(tensors)
        + f"instance_group [ {{ kind: {kind}, count: 1 }} ]\ndynamic_batching {{ }}\n"
        + (_CUDA if ep == "cuda" else "")
    )


def _tensor(role: str, value: onnx.ValueInfoProto) -> str:
    """Return one tensor's entry; the batch dimension, first in every tensor, is implied by max_batch_size."""
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise InputError(
            f"{role} {value.name} has type {kind}, which the Triton configuration does not cover"
        )
    dims = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "-1" for d in tensor.shape.dim[1:])
    return f'{role} [ {{ name: "{value.name}", data_type: {_TYPES[tensor.elem_type]}, dims: [ {dims} ] }} ]\n'


TARGET = Target(
    "triton",
    "a model repository for Triton's ONNX Runtime backend, hard links to the bundle's graph",
    write_repository,
)
