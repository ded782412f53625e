"""One projection instead of several on the same input: [W_1; W_2] x, then a Split.

Joins the up-projections of a factor pair, the down-projections of the KV groups, dense q/k/v and gate/up.
Kernels start once instead of several times, and the packed q/k/v feeds GroupQueryAttention directly.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.base import GraphPass
from rk_export.passes.graph.nodes import PART_KEY, SITE_KEY, concatenated, constant, weight_of
from rk_export.passes.graph.packing import INT8_PRODUCT, MatrixFormat, packs, role_of

# Operator -> the most tensors that a matrix is stored in: others that it may take are not stacked.
_TENSORS = {"MatMul": 1, "MatMulNBits": 3, INT8_PRODUCT: 2}


@dataclass(frozen=True)
class ProductNode:
    """A marked product with a stored matrix, with the Add of its bias where there is one."""

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
        return _width(self.node)

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        return tuple(value for value in self.node.inputs[1:] if value is not None)

    @property
    def site(self) -> str:
        """Name of the site that the matrix belongs to."""
        return self.node.metadata_props[SITE_KEY]

    @property
    def part(self) -> str:
        """The matrix' part in the site."""
        return self.node.metadata_props[PART_KEY]

    @property
    def role(self) -> str:
        """What the product computes."""
        return role_of(self.part)

    @property
    def source(self) -> Hashable:
        """The value that the product reads."""
        return self.node.inputs[0]

    @property
    def format(self) -> MatrixFormat:
        """How the matrix is stored."""
        types = tuple(value.dtype for value in self.weights)
        named = sorted((name, attr.value) for name, attr in self.node.attributes.items() if name != "N")
        return MatrixFormat(self.node.op_type, types, tuple(named), self.add is not None)

    @classmethod
    def of(cls, node: ir.Node) -> ProductNode | None:
        """Return the product that a node is, or None."""
        if SITE_KEY not in node.metadata_props or not _is_stackable(node):
            return None
        uses = list(node.outputs[0].uses())
        if (
            len(uses) == 1
            and not node.outputs[0].is_graph_output()
            and _adds_bias(uses[0].node, _width(node))
        ):
            node_of = cls(node, uses[0].node)
        else:
            node_of = cls(node, None)
        return None if node_of.output.is_graph_output() else node_of


def _is_stackable(node: ir.Node) -> bool:
    """Whether a node is a product whose matrix is all initializers that can be joined along its rows."""
    tensors = [weight_of(value) for value in node.inputs[1:]]
    if not tensors or None in tensors or len(tensors) > _TENSORS.get(node.op_type, 0):
        return False
    if node.op_type == "MatMulNBits":
        return True
    shapes = [() if value is None or value.shape is None else value.shape.numpy() for value in tensors]
    return len(shapes[0]) == 2 and all(shape == shapes[0][1:] for shape in shapes[1:])


def _width(node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return node.attributes["N"].as_int()
    weight = node.inputs[1]
    assert weight is not None  # `_is_stackable` took no other
    assert weight.shape is not None
    return int(weight.shape.numpy()[1])


def _adds_bias(node: ir.Node, width: int) -> bool:
    bias = weight_of(node.inputs[1]) if node.op_type == "Add" else None
    return bias is not None and bias.shape is not None and bias.shape.numpy() == (width,)


class PackedProjections(GraphPass[list[ProductNode]]):
    """Pack marked products that read the same value; see `packs` for which, `mark` for marking the nodes of a model."""

    name = "packed projections"
    needs = "an input must be read by several matrices of one format, marked and stored in initializers"

    def matches(self, graph: ir.Graph) -> Sequence[list[ProductNode]]:
        """Return the products to pack, at least two each."""
        return packs(product for node in graph if (product := ProductNode.of(node)) is not None)

    def rewrite(self, graph: ir.Graph, matches: Sequence[list[ProductNode]]) -> None:
        for group in matches:
            _pack(graph, group)


def _pack(graph: ir.Graph, group: list[ProductNode]) -> None:
    """Replace products by one, the Add of their joined biases, and a Split into their outputs."""
    parts = "_".join(product.part for product in group)
    name = f"{group[0].site}.{parts}"
    packed = _packed_node(graph, group, name)
    packed.metadata_props.update(group[0].node.metadata_props)
    packed.metadata_props[SITE_KEY] = "+".join(dict.fromkeys(product.site for product in group))
    packed.metadata_props[PART_KEY] = parts
    new = [packed]
    if biases := [product.bias for product in group if product.bias is not None]:
        bias = concatenated(biases, 0, f"{name}.bias")
        graph.register_initializer(bias)
        new.append(ir.Node("", "Add", [packed.outputs[0], bias], name=f"{name}.add"))
    split = _split_node(graph, group, new[-1].outputs[0], name)
    graph.insert_before(group[0].node, [*new, split])
    for product, output in zip(group, split.outputs, strict=True):
        _replace(graph, product, output)


def _packed_node(graph: ir.Graph, group: list[ProductNode], name: str) -> ir.Node:
    """Return the product by the stacked matrices."""
    first = group[0].node
    attributes = dict(first.attributes)
    axis = -1
    if first.op_type == "MatMulNBits":
        attributes["N"] = ir.AttrInt64("N", sum(product.width for product in group))
        axis = 0
    weights = []
    for slot, values in enumerate(zip(*(product.weights for product in group), strict=True)):
        weights.append(concatenated(values, axis, f"{name}.{slot}"))
        graph.register_initializer(weights[-1])
    inputs = [first.inputs[0], *weights]
    return ir.Node(first.domain, first.op_type, inputs, attributes.values(), num_outputs=1, name=name)


def _split_node(graph: ir.Graph, group: list[ProductNode], value: ir.Value, name: str) -> ir.Node:
    widths = np.array([product.width for product in group], dtype=np.int64)
    inputs = [value, constant(graph, f"{name}.sizes", widths)]
    axis = [ir.AttrInt64("axis", -1)]
    return ir.Node("", "Split", inputs, axis, num_outputs=len(group), name=f"{name}.split")


def _replace(graph: ir.Graph, product: ProductNode, output: ir.Value) -> None:
    old = product.output
    output.type, output.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, output)
    for node in (product.add, product.node):
        if node is not None:
            graph.remove(node, safe=True)
