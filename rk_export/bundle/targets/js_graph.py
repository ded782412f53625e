"""A graph as transformers.js 4 wants it: names of dimensions, inputs and files, and the name of its format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from rk_export.errors import InputError

BATCH = "batch_size"
KEPT = "num_logits_to_keep"
_START = "logits_start"
# A file's name ends in what transformers.js derives from the dtype.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"} | {
    f"q{bits}{kind}": f"_q{bits}{kind}" for bits in (2, 4) for kind in ("", "f16")
}


def read_graph(bundle: Path) -> onnx.ModelProto:
    """Return a bundle's graph without its external data.

    Raises:
        InputError: The bundle has no ``model.onnx``.
    """
    if not (bundle / "model.onnx").is_file():
        raise InputError("model.onnx is missing", where=str(bundle), fix="export the bundle again")
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def dtype_of(graph: onnx.GraphProto) -> str:
    """Return the graph's format as transformers.js names it.

    The fewest bits of its packed matrices decide; ``q8`` stands for 8 bits beside floats of either size.
    """
    half = any(_element(value) == TensorProto.FLOAT16 for value in (*graph.input, *graph.output))
    bits = min(_packed_bits(graph), default=None)
    if bits is None:
        return "fp16" if half else "fp32"
    if bits > 4:
        return "q8"
    return f"q{2 if bits <= 2 else 4}{'f16' if half else ''}"


def name_batch(graph: onnx.GraphProto) -> None:
    """Call the batch dimension ``batch_size`` everywhere: transformers.js makes its first cache from that name."""
    (old,) = (one.type.tensor_type.shape.dim[0].dim_param for one in graph.input if one.name == "input_ids")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == old:
                dim.dim_param = BATCH


def keep_logits(graph: onnx.GraphProto) -> None:
    """Replace the optional input ``logits_start`` by ``num_logits_to_keep``, int64 without dimensions, 0 for all.

    transformers.js feeds 1 while it generates, so that the prompt's other logits are not computed. Both count from
    the end: the first position is minus the number.
    """
    if _START not in {tensor.name for tensor in graph.initializer}:
        return
    for values in (graph.input, graph.initializer):
        kept = [value for value in values if value.name != _START]
        del values[:]
        values.extend(kept)
    graph.input.append(helper.make_tensor_value_info(KEPT, TensorProto.INT64, []))
    shape = f"{KEPT}.shape"
    graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [1], [1]))
    nodes = [
        helper.make_node("Neg", [KEPT], [f"{KEPT}.negative"], name=f"{KEPT}.neg"),
        helper.make_node("Reshape", [f"{KEPT}.negative", shape], [_START], name=f"{KEPT}.reshape"),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)


def rename_data(graph: onnx.GraphProto, file: str) -> dict[str, str]:
    """Name the files of weights after the graph's: ``FILE_data``, ``FILE_data_1`` ...; returns old name -> new."""
    places = [one for tensor in graph.initializer for one in tensor.external_data if one.key == "location"]
    olds = sorted({one.value for one in places})
    names = {old: f"{file}_data" + (f"_{number}" if number else "") for number, old in enumerate(olds)}
    for one in places:
        one.value = names[one.value]
    return names


def _packed_bits(graph: onnx.GraphProto) -> Iterator[int]:
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            yield next((one.i for one in node.attribute if one.name == "bits"), 4)  # both operators' default
        elif node.op_type == "MatMulIntegerToFloat":
            yield 8


def _element(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)
