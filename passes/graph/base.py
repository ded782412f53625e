"""The contract of graph passes: onnx-ir's own, with a count of patterns that is planned and held.

A pass knows one pattern. It can stand in `onnx_ir.passes.Sequential` beside the passes of the library, and run on any
`ir.Model`:

- `requires` counts the pattern before anything is changed; a count other than the planned one is a `FusionError`.
- `call` rewrites every match in place; the result carries the `Fusion`.
- `ensures` looks again: a pattern that is still there is a `FusionError` too.

The passes edit nodes in place instead of being onnxscript rewrite rules: the patterns are groups of nodes that read one
value or values of the whole graph, the names and marks of nodes must survive, and weights must stay lazy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar, cast

import onnx_ir as ir

from rk_export.errors import FusionError
from rk_export.report.records import Fusion

Match = TypeVar("Match")


class UnmetFusionError(FusionError, ir.passes.PreconditionError, ir.passes.PostconditionError):
    """A `FusionError` that onnx-ir passes on as it is: a broken condition, not a failure inside a condition."""


@dataclass
class FusionResult(ir.passes.PassResult):
    """What a graph pass returns.

    Args:
        fusion: How often the pattern was planned and found.
    """

    fusion: Fusion


class GraphPass(ir.passes.InPlacePass, Generic[Match]):
    """A rewrite of one pattern in the main graph of a model, in place.

    Subclasses say what the pattern is (`matches`) and what takes its place (`rewrite`); the counting is done here.
    Inside `ir.passes.Sequential` a `FusionError` is the cause of the library's `PassError`.

    Args:
        planned: How often the pattern must be in the graph; None takes whatever is there.

    Attributes:
        name: The pattern's name in reports.
        needs: What makes a match, in words: the reason that is given when the count is not the planned one.
        opset: The lowest ONNX opset whose operators the rewrite writes.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    opset: ClassVar[int] = 18

    def __init__(self, planned: int | None = None) -> None:
        self.planned = planned

    @abstractmethod
    def matches(self, graph: ir.Graph) -> Sequence[Match]:
        """Return the occurrences of the pattern, in the order of the graph; pure."""

    @abstractmethod
    def rewrite(self, graph: ir.Graph, matches: Sequence[Match]) -> None:
        """Rewrite all occurrences, at least one, in place."""

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> FusionResult:
        """Check, rewrite and check again.

        Raises:
            FusionError: If the pattern is not there as often as planned, or still there afterwards.
        """
        return cast(FusionResult, super().__call__(model_or_result))

    def requires(self, model: ir.Model) -> None:
        found = len(self.matches(model.graph))
        require(self._fusion(found))
        opset = model.graph.opset_imports.get("")
        if found and opset is not None and opset < self.opset:
            raise UnmetFusionError(
                f"the rewrite takes operators of opset {self.opset}, the model imports {opset}",
                where=self.name,
                fix="convert the model with onnxscript.version_converter first",
            )

    def call(self, model: ir.Model) -> FusionResult:
        matches = self.matches(model.graph)
        if matches:
            self.rewrite(model.graph, matches)
        return FusionResult(model, modified=bool(matches), fusion=self._fusion(len(matches)))

    def ensures(self, model: ir.Model) -> None:
        require(
            Fusion(self.name, 0, len(self.matches(model.graph)), "the rewrite left the pattern in the graph")
        )

    def _fusion(self, found: int) -> Fusion:
        planned = found if self.planned is None else self.planned
        return Fusion(self.name, planned, found, "" if found == planned else self.needs)


def run_graph_passes(passes: Iterable[ir.passes.PassBase], model: ir.Model) -> tuple[Fusion, ...]:
    """Run in-place passes in order, ours and the library's; return the fusions of ours.

    Raises:
        FusionError: If a pass finds fewer or more patterns than planned.
    """
    results = [graph_pass(model) for graph_pass in passes]
    return tuple(result.fusion for result in results if isinstance(result, FusionResult))


def require(fusion: Fusion) -> None:
    """Raise FusionError unless the pattern was found as often as planned."""
    if fusion.found != fusion.planned:
        raise UnmetFusionError(
            f"planned {fusion.planned}, found {fusion.found}: {fusion.reason or 'the pattern did not match'}",
            where=fusion.pattern,
            fix="in an export this is a fault of rk-export; please report it with the plan.json",
        )
