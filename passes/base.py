"""Contracts of the passes on a PyTorch model, and the driver that runs them; those on a graph are in `graph/base.py`.

Layers outside, passes inside: a decoder layer is loaded once, every weight pass visits its sites in it, and
it is done. A pass looks at one site, rewrites it in place, and returns a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from rk_export.passes.modules.heads import PaddedHeads, SlicedHeads, without_slots
from rk_export.passes.modules.sparse import without_sparse
from rk_export.plan import LayerShape, SitePlan
from rk_export.report.records import Finding


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

    def at(self, path: str) -> nn.Module:
        """Return the module that holds the matrices of a path, inside the padding of pruned heads and beside S."""
        return without_sparse(without_slots(self.module.get_submodule(path)))

    def linear(self, path: str) -> nn.Linear:
        """Return the dense linear module at a path, inside the padding of pruned heads."""
        module = self.at(path)
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"layers.{self.index}.{path} is {type(module).__name__}, not a dense linear module"
            )
        return module

    def replace(self, path: str, module: nn.Module) -> None:
        """Put a module at a path, inside the padding of pruned heads."""
        parent, _, name = path.rpartition(".")
        owner = self.module.get_submodule(parent)
        present = getattr(owner, name, None)
        if isinstance(present, PaddedHeads | SlicedHeads):
            present.linear = module
        else:
            setattr(owner, name, module)


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


class ShapePass(Protocol):
    """A rewrite that changes the inner dimensions of a whole layer, before its sites are visited.

    Statistics of an input whose width changes no longer describe it afterwards: gather them again.
    """

    name: str

    def applies(self, shape: LayerShape) -> bool:
        """Whether the plan asks this pass to touch the layer; pure."""
        ...

    def rewrite(
        self,
        layer: Layer,
        shape: LayerShape,
        sites: Sequence[SitePlan],
        statistics: Mapping[str, SiteStatistics],
    ) -> Finding:
        """Rewrite one layer in place.

        Args:
            layer: The layer, still dense.
            shape: What it loses.
            sites: Its sites, which say where each role's matrix is.
            statistics: By site name; a site without an entry is judged by its weights.
        """
        ...


def role_paths(sites: Sequence[SitePlan]) -> dict[str, str]:
    """Return the path of each role's matrix in a layer; experts have no role of their own."""
    return {
        role: path
        for site in sites
        for role, path in zip(site.members, site.paths, strict=True)
        if role != "expert"
    }


def inputs_of(
    role: str, sites: Sequence[SitePlan], statistics: Mapping[str, SiteStatistics]
) -> InputMoments | None:
    """Return the moments of what a role's matrix reads, or None where they were not taken."""
    for site in sites:
        if role in site.members and site.site in statistics:
            return statistics[site.site].inputs
    return None
