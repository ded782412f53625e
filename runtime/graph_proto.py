"""Reads and edits the graph file itself, without its external data: facts that a session does not tell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import uses_external_data

from rk_export.errors import InputError
from rk_export.inside import file_inside

_LOOKUPS = ("Gather", "GatherBlockQuantized")  # table, indices
_LEVELLED = ("MatMulNBits", "QMoE")
_AGAIN = "export it again, or get the bundle again from a place that you trust"
_DIGITS = 19  # of a size that fits into 64 bits
_SEQLENS_K = 5  # index of the input of GroupQueryAttention


@dataclass(frozen=True)
class GraphFacts:
    """What the nodes of a graph allow.

    Args:
        shared_cache: Past and present may be one buffer (every layer is a ``GroupQueryAttention``).
        row_lengths: Rows of a batch may be of unequal length: every ``GroupQueryAttention`` is told each row's own,
            from a sum over the mask.
        embedding_rows: Tokens that the embedding knows; None where no table is read by ``input_ids`` directly.
    """

    shared_cache: bool
    row_lengths: bool
    embedding_rows: int | None


def read_facts(model: Path) -> GraphFacts:
    """Look at the embedding and the attention nodes of a graph file.

    Raises:
        InputError: The file is not an ONNX graph.
    """
    graph = load_proto(model).graph
    grouped = [node for node in _nodes(graph) if node.op_type == "GroupQueryAttention"]
    lengths = {node.input[_SEQLENS_K] for node in grouped if len(node.input) > _SEQLENS_K}
    return GraphFacts(
        shared_cache=bool(grouped),
        row_lengths=bool(lengths) and all(_sums_mask(graph, name) for name in lengths),
        embedding_rows=_embedding_rows(graph),
    )


def _sums_mask(graph: Any, name: str) -> bool:
    """Whether a value is computed from a sum over the attention mask."""
    makers = {output: node for node in graph.node for output in node.output}
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type == "ReduceSum":
            return True
        waiting.extend(node.input)
    return False


def _embedding_rows(graph: Any) -> int | None:
    tables = {initializer.name: initializer.dims for initializer in graph.initializer}
    rows = [
        tables[node.input[0]][0]
        for node in graph.node
        if node.op_type in _LOOKUPS and node.input[1] == "input_ids" and node.input[0] in tables
    ]
    return min(rows, default=None)


def graph_bytes(model: Path, level: int | None) -> tuple[bytes, Path]:
    """Return a graph to open from memory; its external data stays on disk, links to it followed.

    Args:
        model: The file.
        level: ``accuracy_level`` of every ``MatMulNBits`` and ``QMoE``; None keeps it. At 0 products with int8
            inputs (``MatMulIntegerToFloat``) become products with float inputs too.

    Returns:
        The graph, and the folder that its external data is relative to.

    Raises:
        InputError: The file is not an ONNX graph.
    """
    proto = load_proto(model)
    if level is not None:
        _set_level(proto.graph, level)
    if level == 0:
        _read_floats(proto.graph)
    folder = _follow_links(proto, model.parent)
    return bytes(proto.SerializeToString()), folder


def _set_level(graph: Any, level: int) -> None:
    for node in _nodes(graph):
        if node.op_type in _LEVELLED:
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])


def check_graph(model: Path) -> None:
    """Refuse a graph that reads files outside its folder, or more than they hold, before a runtime opens it.

    Raises:
        InputError: The file is not an ONNX graph, or an external tensor names an absolute path, ``..``, a link out of
            the folder, or bytes that its file does not have.
    """
    if model.is_file():
        file_inside(model.parent, model.name, where=str(model), fix=_AGAIN)
    proto = load_proto(model)
    sizes: dict[str, int] = {}
    for tensor in _all_tensors(proto):
        if uses_external_data(tensor):
            _check_external(tensor, model, sizes)


def _check_external(tensor: Any, model: Path, sizes: dict[str, int]) -> None:
    given = {entry.key: entry.value for entry in tensor.external_data}
    location = given.get("location", "")
    if location not in sizes:
        path = file_inside(model.parent, location, where=str(model), fix=_AGAIN)
        sizes[location] = path.stat().st_size
    begin, length = (_count(given, key, model) for key in ("offset", "length"))
    if begin + length > sizes[location]:
        raise InputError(
            f"tensor {tensor.name!r} reads {length:,} bytes from byte {begin:,} of {location}, which has "
            f"{sizes[location]:,}",
            where=str(model),
            fix=_AGAIN,
        )


def _count(given: dict[str, str], key: str, model: Path) -> int:
    text = given.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) < _DIGITS):
        raise InputError(f"{key} of an external tensor is {text!r}", where=str(model), fix=_AGAIN)
    return int(text)


def _all_tensors(message: Any) -> Iterator[Any]:
    """Yield every tensor in a message: those of subgraphs, functions, sparse tensors and training graphs too."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in [value] if hasattr(value, "ListFields") else value:
            if isinstance(item, onnx.TensorProto):
                yield item
            else:
                yield from _all_tensors(item)


def _follow_links(proto: Any, folder: Path) -> Path:
    """Let external data be read from where links lead; return the folder that it is then relative to.

    ONNX Runtime opens no external file outside the folder of the graph, links followed. In a cache of the Hub every
    file is a link into another folder, where it has another name.
    """
    entries = [
        entry
        for tensor in _all_tensors(proto)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    files = {entry.value: (folder / entry.value).resolve() for entry in entries}
    if not files:
        return folder
    base = Path(os.path.commonpath([file.parent for file in files.values()]))
    for entry in entries:
        entry.value = files[entry.value].relative_to(base).as_posix()
    return base


def _read_floats(graph: Any) -> None:
    """Let products with int8 inputs read what their inputs were quantized from; the weights stay int8."""
    makers = {node.output[0]: node for node in graph.node}
    nodes = [
        new
        for node in graph.node
        for new in (_float_product(node, makers) if node.op_type == "MatMulIntegerToFloat" else [node])
    ]
    del graph.node[:]
    graph.node.extend(nodes)


def _float_product(node: Any, makers: dict[str, Any]) -> list[Any]:
    codes, weights, step, scales = node.input[:4]
    floats, sums = (f"{node.output[0]}.{name}" for name in ("weights", "sums"))
    make = onnx.helper.make_node
    maker, before = makers[codes], list[Any]()
    if maker.op_type == "QuantizeLinear":
        unit = maker.input[0]
    else:
        unit, before = _whole_units(node.output[0], maker, makers, step)
    return [
        *before,
        make("Cast", [weights], [floats], to=onnx.TensorProto.FLOAT),
        make("MatMul", [unit, floats], [sums]),
        make("Mul", [sums, scales], list(node.output)),
    ]


def _whole_units(name: str, reshape: Any, makers: dict[str, Any], step: str) -> tuple[str, list[Any]]:
    """Return what codes that have a step for each row were rounded from, in parts of its row's largest value.

    Args:
        name: What new values begin with.
        reshape: The node that gives the codes their shape.
        makers: The node that makes each value.
        step: The initializer with the step of parts.
    """
    quantize = makers[reshape.input[0]]
    column, steps, codes, parts, whole = (
        f"{name}.{part}" for part in ("column", "steps", "codes", "parts", "whole")
    )
    make = onnx.helper.make_node
    axis = make("Constant", [], [column], value_ints=[1])
    nodes = [
        axis,
        make("Unsqueeze", [quantize.input[1], column], [steps]),
        make("Div", [quantize.input[0], steps], [codes]),
        make("Mul", [codes, step], [parts]),
        make("Reshape", [parts, reshape.input[1]], [whole]),
    ]
    return whole, nodes


def load_proto(model: Path) -> Any:
    """Return the ``onnx.ModelProto`` of a file, external data left on disk.

    Raises:
        InputError: The file is not an ONNX graph.
    """
    try:
        return onnx.load(str(model), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise InputError(
            f"not a readable ONNX graph ({error})", where=str(model), fix="export it again"
        ) from error


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
