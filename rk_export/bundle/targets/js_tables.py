"""Quantized embedding tables in plain operators.

The WebAssembly build that transformers.js 4.3 loads by default has no kernel of GatherBlockQuantized for the
processor. Gather, and arithmetic on the few rows that it returns, give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper


def expand_tables(graph: onnx.GraphProto) -> None:
    """Replace every GatherBlockQuantized that looks up whole rows of a table of bytes."""
    tables = {one.name: one for one in graph.initializer if one.data_type == TensorProto.UINT8}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "GatherBlockQuantized" and node.input[0] in tables and _takes_rows(node):
            table = _Lookup(node, tables[node.input[0]].dims[-1])
            table.write()
            nodes += table.nodes
            graph.initializer.extend(table.constants.values())
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


@dataclass
class _Lookup:
    """What takes the place of one lookup: (code − zero point) · scale in floats, block by block of the rows.

    Args:
        node: The lookup.
        row_bytes: Of the table.
    """

    node: onnx.NodeProto
    row_bytes: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def write(self) -> None:
        """Write nodes and constants; the last node gives the lookup's output."""
        data, rows, scales, *points = self.node.input
        found = _attributes(self.node)
        bits, block = found.get("bits", 4), found.get("block_size", 128)
        blocks = self.row_bytes * 8 // bits // block
        codes = self._floats(self._op("Gather", data, rows), bits, blocks * block)
        codes = self._op("Reshape", codes, self._constant([0, 0, blocks, block]))
        if points and points[0]:
            packed = self._op("Gather", points[0], rows)
            centre = self._op("Unsqueeze", self._floats(packed, bits, blocks), self._constant([-1]))
        else:
            centre = self._constant([1 << (bits - 1)], TensorProto.FLOAT)
        scale = self._op("Gather", scales, rows)
        step = self._op("Unsqueeze", self._op("Cast", scale, to=TensorProto.FLOAT), self._constant([-1]))
        values = self._op("Mul", self._op("Sub", codes, centre), step)
        values = self._op("Reshape", values, self._constant([0, 0, blocks * block]))
        self.nodes.append(helper.make_node("CastLike", [values, scale], [self.node.output[0]]))

    def _floats(self, packed: str, bits: int, count: int) -> str:
        """Return so many codes of each row as floats; the first code lies in the lowest bits of a byte."""
        if bits < 8:
            shifts = self._constant(list(range(0, 8, bits)), TensorProto.UINT8)
            apart = self._op("Unsqueeze", packed, self._constant([-1]))
            shifted = self._op("BitShift", apart, shifts, direction="RIGHT")
            masked = self._op("BitwiseAnd", shifted, self._constant([(1 << bits) - 1], TensorProto.UINT8))
            flat = self._op("Reshape", masked, self._constant([0, 0, -1]))
            packed = self._op(
                "Slice", flat, self._constant([0]), self._constant([count]), self._constant([-1])
            )
        return self._op("Cast", packed, to=TensorProto.FLOAT)

    def _op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.node.output[0]}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{name}.{kind}", **attributes))
        return name

    def _constant(self, values: list[int], kind: int = TensorProto.INT64) -> str:
        name = f"{self.node.output[0]}.{TensorProto.DataType.Name(kind).lower()}.{'_'.join(map(str, values))}"
        self.constants[name] = helper.make_tensor(name, kind, [len(values)], values)
        return name


def _takes_rows(node: onnx.NodeProto) -> bool:
    found = _attributes(node)
    return found.get("gather_axis", 0) == 0 and found.get("quantize_axis", 1) in (1, -1)


def _attributes(node: onnx.NodeProto) -> Mapping[str, int]:
    return {one.name: one.i for one in node.attribute}
