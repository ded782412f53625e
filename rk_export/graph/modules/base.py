"""What every module that we put into the export tree says about itself, so that the graph can be held to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import nn as onn

from rk_export.passes.graph.packing import Product


@dataclass(frozen=True)
class Pattern:
    """Something that a module emits and that can be recognized in the traced graph, before any graph pass.

    Args:
        name: Its name in reports.
        count: How often it is in a graph.
    """

    name: str
    count: Callable[[ir.Graph], int]


def operators(name: str, domain: str, *op_types: str) -> Pattern:
    """Return the pattern of single nodes of some types."""

    def count(graph: ir.Graph) -> int:
        return sum(node.domain == domain and node.op_type in op_types for node in graph)

    return Pattern(name, count)


class ExportModule(onn.Module):
    """A module of the export tree that declares what it puts into the graph."""

    def emits(self) -> Counter[Pattern]:
        """Return how often the module itself, without its children, emits each pattern."""
        return Counter()

    def products(self, source: Hashable) -> tuple[Product, ...]:
        """Return the products with stored matrices of the module and its children that may be packed with others.

        Args:
            source: What the module reads; equal for modules that read one value.
        """
        del source
        return ()
