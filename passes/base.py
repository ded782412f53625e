"""Contracts of the passes, and the drivers that run them.

Layers outside, passes inside: a decoder layer is loaded once, every weight pass visits its sites in it, and
it is done. A pass looks at one site, rewrites it in place, and returns a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir
from torch import Tensor, nn

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


@dataclass(frozen=True)
class InputMoments:
    """Second moments of what a site's matrices read, taken through the part that is compressed already.

    Args:
        second: Mean over tokens of x xᵀ, float32 (in, in), x an input in the compressed model.
        cross: Mean of x₀ xᵀ, (in, in), x₀ the same token's input in the dense model; None where the two agree.
        tokens: How many tokens were averaged; 0 where the moments were derived from weights alone.
    """

    second: Tensor
    cross: Tensor | None = None
    tokens: int = 0


@dataclass(frozen=True)
class SiteStatistics:
    """What is known about a site beside its weights.

    Args:
        inputs: Moments of the common input.
        outputs: Role -> mean over tokens of g gᵀ, (out, out), g the loss' gradient by the member's output in the
            dense model; empty where no gradients were taken.
    """

    inputs: InputMoments
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


class WeightPass(Protocol):
    """A rewrite of the PyTorch model, one site at a time, without gradients."""

    name: str

    def applies(self, plan: SitePlan) -> bool:
        """Whether the plan asks this pass to touch the site; pure."""
        ...

    def rewrite(self, layer: Layer, plan: SitePlan, statistics: SiteStatistics | None) -> Finding:
        """Rewrite one site in place; without statistics all inputs and outputs weigh alike."""
        ...


def run_weight_pass(
    weight_pass: WeightPass,
    layer: Layer,
    sites: Iterable[SitePlan],
    statistics: Mapping[str, SiteStatistics],
) -> list[Finding]:
    """Run one pass over the sites of one layer; `statistics` by site name."""
    return [
        weight_pass.rewrite(layer, site, statistics.get(site.site))
        for site in sites
        if weight_pass.applies(site)
    ]


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
