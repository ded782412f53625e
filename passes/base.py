"""Contracts of the passes, and the drivers that run them.

Layers outside, passes inside: a decoder layer is loaded once, every weight pass visits its sites in it, and
it is done. A pass looks at one site, rewrites it in place, and returns a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
from torch import nn

from rk_export.errors import FusionError
from rk_export.plan import SitePlan
from rk_export.report import Finding, Fusion


@dataclass(frozen=True)
class Layer:
    """One decoder layer on its way through the passes.

    Args:
        index: Position in the model.
        module: The canonical PyTorch layer (fused projections split).
        kv_groups: Number of key-value heads.
    """

    index: int
    module: nn.Module
    kv_groups: int

    def linear(self, path: str) -> nn.Linear:
        """Return the dense linear module at a path."""
        module = self.module.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"layers.{self.index}.{path} is {type(module).__name__}, not a dense linear module"
            )
        return module

    def replace(self, path: str, module: nn.Module) -> None:
        """Put a module at a path."""
        parent, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, module)


class WeightPass(Protocol):
    """A rewrite of the PyTorch model, one site at a time, without gradients."""

    name: str

    def applies(self, plan: SitePlan) -> bool:
        """Whether the plan asks this pass to touch the site; pure."""
        ...

    def rewrite(self, layer: Layer, plan: SitePlan) -> Finding:
        """Rewrite one site in place."""
        ...


def run_weight_pass(weight_pass: WeightPass, layer: Layer, sites: Iterable[SitePlan]) -> list[Finding]:
    """Run one pass over the sites of one layer."""
    return [weight_pass.rewrite(layer, site) for site in sites if weight_pass.applies(site)]


class GraphPass(Protocol):
    """A rewrite of the ONNX graph that knows how many patterns it must find."""

    name: str

    def call(self, model: ir.Model) -> Fusion:
        """Rewrite the model in place and report the patterns planned and found."""
        ...


def run_graph_passes(passes: Sequence[GraphPass], model: ir.Model) -> list[Fusion]:
    """Run graph passes in order.

    Raises:
        FusionError: If a pass found fewer or more patterns than it planned.
    """
    fusions = []
    for graph_pass in passes:
        fusion = graph_pass.call(model)
        require(fusion)
        fusions.append(fusion)
    return fusions


def require(fusion: Fusion) -> None:
    """Raise FusionError unless the fusion was found as often as planned."""
    if fusion.found != fusion.planned:
        raise FusionError(
            f"planned {fusion.planned}, found {fusion.found}: {fusion.reason or 'the pattern did not match'}",
            where=fusion.pattern,
            fix="this is a fault of rk-export; please report it with the plan.json",
        )
