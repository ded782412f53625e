"""One projection instead of several on the same input: [W_1; W_2] x, then a Split.

Joins the up-projections of a factor pair, the down-projections of the KV groups, dense q/k/v and gate/up.
Kernels start once instead of several times, and the packed q/k/v feeds GroupQueryAttention directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.nodes import MICROSOFT, PART_KEY, SITE_KEY, concatenated, constant, weight_of
from rk_export.report.records import Fusion

PRODUCTS = ("MatMul", "MatMulNBits", "DynamicQuantizeMatMul")
ATTENTION_PARTS = ("q", "k", "v")


def worth_packing(parts: Sequence[str], *, int8: bool) -> bool:
    """Whether one product should stand for several on the same input.

    Int8 products are made for long inputs, where copying the parts out of a packed product costs more than
    starting more kernels (2 % of a 512-token prefill of SmolLM2-135M); attention takes q, k and v without a copy.
    """
    return len(parts) > 1 and (not int8 or tuple(parts) == ATTENTION_PARTS)


@dataclass(frozen=True)
class Projection:
    """A product with a stored matrix, with the Add of its bias where there is one."""

    node: ir.Node
    add: ir.Node | None

    @property
    def output(self) -> ir.Value:
        return (self.add or self.node).outputs[0]

    @property
    def bias(self) -> ir.Value | None:
        return None if self.add is None else self.add.inputs[1]

    @property
    def width(self) -> int:
        """Output features."""
        if self.node.op_type == "MatMulNBits":
            return self.node.attributes["N"].as_int()
        tensor = self.weights[0].const_value
        assert tensor is not None  # `of` took no other
        return int(tensor.shape.numpy()[1])

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        return tuple(value for value in self.node.inputs[1:] if value is not None)

    @property
    def site(self) -> str:
        """Name of the site that the matrix belongs to."""
        return self.node.metadata_props[SITE_KEY]

    @property
    def kind(self) -> tuple[object, ...]:
        """Projections pack when their kinds are equal: operator, input, format, and bias or none."""
        attributes = sorted((name, attr.value) for name, attr in self.node.attributes.items() if name != "N")
        return (self.node.op_type, len(self.weights), self.bias is None, *attributes)

    @classmethod
    def of(cls, node: ir.Node) -> Projection | None:
        """Return the projection that a node is, or None."""
        if node.op_type not in PRODUCTS or SITE_KEY not in node.metadata_props:
            return None
        if any(value is not None and weight_of(value) is None for value in node.inputs[1:]):
            return None
        uses = list(node.outputs[0].uses())
        if len(uses) == 1 and uses[0].node.op_type == "Add" and weight_of(uses[0].node.inputs[1]) is not None:
            return cls(node, uses[0].node)
        return cls(node, None)


class PackedProjections:
    """Pack projections that read the same value.

    Args:
        planned: How many packed projections the plan promises.
    """

    name = "packed projections"

    def __init__(self, planned: int) -> None:
        self.planned = planned

    def call(self, model: ir.Model) -> Fusion:
        groups = list(_groups(model.graph))
        for group in groups:
            _pack(model.graph, group)
        reason = f"the plan promises {self.planned} inputs that several matrices of one format read"
        return Fusion(self.name, self.planned, len(groups), "" if len(groups) == self.planned else reason)


def _groups(graph: ir.Graph) -> Iterator[list[Projection]]:
    """Yield the projections to pack, at least two each, in the order of the graph."""
    by_input: dict[tuple[object, ...], list[Projection]] = {}
    for node in graph:
        if (projection := Projection.of(node)) is not None:
            by_input.setdefault((node.inputs[0], *projection.kind), []).append(projection)
    for group in by_input.values():
        parts = [projection.node.metadata_props[PART_KEY] for projection in group]
        if worth_packing(parts, int8=group[0].node.op_type == "DynamicQuantizeMatMul"):
            yield group


def _pack(graph: ir.Graph, group: list[Projection]) -> None:
    """Replace projections by one, the Add of their joined biases, and a Split into their outputs."""
    parts = "_".join(projection.node.metadata_props[PART_KEY] for projection in group)
    name = f"{group[0].site}.{parts}"
    packed = _packed_node(graph, group, name)
    packed.metadata_props.update(group[0].node.metadata_props)
    packed.metadata_props[SITE_KEY] = "+".join(dict.fromkeys(projection.site for projection in group))
    packed.metadata_props[PART_KEY] = parts
    new = [packed]
    if biases := [projection.bias for projection in group if projection.bias is not None]:
        bias = concatenated(biases, 0, f"{name}.bias")
        graph.register_initializer(bias)
        new.append(ir.Node("", "Add", [packed.outputs[0], bias], name=f"{name}.add"))
    split = _split_node(graph, group, new[-1].outputs[0], name)
    graph.insert_before(group[0].node, [*new, split])
    for projection, output in zip(group, split.outputs, strict=True):
        _replace(graph, projection, output)


def _packed_node(graph: ir.Graph, group: list[Projection], name: str) -> ir.Node:
    """Return the projection by the stacked matrices."""
    first = group[0].node
    attributes = dict(first.attributes)
    axis = -1
    if first.op_type == "MatMulNBits":
        attributes["N"] = ir.AttrInt64("N", sum(projection.width for projection in group))
        axis = 0
    weights = []
    for slot, values in enumerate(zip(*(projection.weights for projection in group), strict=True)):
        weights.append(concatenated(values, axis, f"{name}.{slot}"))
        graph.register_initializer(weights[-1])
    inputs = [first.inputs[0], *weights]
    return ir.Node(first.domain, first.op_type, inputs, attributes.values(), num_outputs=1, name=name)


def _split_node(graph: ir.Graph, group: list[Projection], value: ir.Value, name: str) -> ir.Node:
    widths = np.array([projection.width for projection in group], dtype=np.int64)
    inputs = [value, constant(graph, f"{name}.sizes", widths)]
    axis = [ir.AttrInt64("axis", -1)]
    return ir.Node("", "Split", inputs, axis, num_outputs=len(group), name=f"{name}.split")


def _replace(graph: ir.Graph, projection: Projection, output: ir.Value) -> None:
    old = projection.output
    output.type, output.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, output)
    for node in (projection.add, projection.node):
        if node is not None:
            graph.remove(node, safe=True)


class PackedAttention:
    """Feed the packed q/k/v projection to GroupQueryAttention without splitting it.

    Args:
        planned: How many attention nodes the plan promises to feed so.
    """

    name = "packed query, key and value"

    def __init__(self, planned: int) -> None:
        self.planned = planned

    def call(self, model: ir.Model) -> Fusion:
        found = 0
        for node in list(model.graph):
            if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
                continue
            split = node.inputs[0].producer() if node.inputs[0] is not None else None
            if split is None or split.op_type != "Split" or list(split.outputs) != list(node.inputs[:3]):
                continue
            node.replace_input_with(0, split.inputs[0])
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)
            model.graph.remove(split, safe=True)
            found += 1
        reason = (
            "" if found == self.planned else "a Split of one packed projection must yield exactly q, k, v"
        )
        return Fusion(self.name, self.planned, found, reason)
