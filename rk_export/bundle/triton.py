"""Triton model repository of a bundle, for the onnxruntime backend."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Literal

import onnx

from rk_export.errors import InputError

logger = logging.getLogger(__name__)

_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
}
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


def triton_repository(
    folder: Path, name: str, *, ep: Literal["cpu", "cuda"] = "cpu", max_batch_size: int = 8
) -> Path:
    """Add ``triton/{name}`` to a bundle; Triton is then started with ``--model-repository {folder}/triton``.

    The graph and its external data appear as hard links in a directory called ``model.onnx``, the form Triton
    takes for models of several files; they are copied where the file system has no hard links.

    Args:
        folder: A bundle with ``model.onnx``.
        name: Name of the served model.
        ep: Execution provider of the instances.
        max_batch_size: Requests of equal shape that Triton may join into one batch.

    Returns:
        ``{folder}/triton/{name}``.

    Raises:
        InputError: The bundle has no ``model.onnx``, or an input or output type has no counterpart in Triton.
    """
    if not (folder / "model.onnx").is_file():
        raise InputError("model.onnx is missing", where=str(folder))
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    files = {"model.onnx"} | {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    text = _config(graph, name, ep, max_batch_size)
    place = folder / "triton" / name
    model = place / "1" / "model.onnx"
    model.mkdir(parents=True)
    for file in sorted(files):
        _link(folder / file, model / file)
    (place / "config.pbtxt").write_text(text, encoding="utf-8")
    return place


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        logger.info("%s: copied, hard links do not work here (%s)", target.name, error.strerror)
        shutil.copyfile(source, target)


def _config(graph: onnx.GraphProto, name: str, ep: str, max_batch_size: int) -> str:
    # The server counts the inputs of the session, and an initializer that may be overridden is none of them.
    optional = {tensor.name for tensor in graph.initializer}
    required = [value for value in graph.input if value.name not in optional]
    tensors = [_tensor("input", v) for v in required] + [_tensor("output", v) for v in graph.output]
    kind = "KIND_GPU" if ep == "cuda" else "KIND_CPU"
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {max_batch_size}\n'
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
