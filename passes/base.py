"""Contracts of the passes on a PyTorch model, and the driver that runs them; those on a graph are in `graph/base.py`.

Layers outside, passes inside: a decoder layer is loaded once, every weight pass visits its sites in it, and
it is done. A pass looks at one site, rewrites it in place, and returns a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from rk_export.passes.modules.heads import PaddedHeads, SlicedHeads, without_slots
from rk_export.passes.modules.sparse import without_sparse
from rk_export.passes.numerics.curvature import Curvature, Inputs
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


class WeightPass(Protocol):
    """A rewrite of the PyTorch model, one site at a time, without gradients."""

    name: str

    def applies(self, plan: SitePlan) -> bool:
        """Whether the plan asks this pass to touch the site; pure."""
        ...

    def rewrite(self, layer: Layer, plan: SitePlan, curvature: Curvature | None) -> Finding:
        """Rewrite one site in place; without a curvature all inputs and outputs weigh alike."""
        ...


def run_weight_pass(
    weight_pass: WeightPass,
    layer: Layer,
    sites: Iterable[SitePlan],
    curvatures: Mapping[str, Curvature],
) -> list[Finding]:
    """Run one pass over the sites of one layer; `curvatures` by site name."""
    return [
        weight_pass.rewrite(layer, site, curvatures.get(site.site))
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
        curvatures: Mapping[str, Curvature],
    ) -> Finding:
        """Rewrite one layer in place.

        Args:
            layer: The layer, still dense.
            shape: What it loses.
            sites: Its sites, which say where each role's matrix is.
            curvatures: By site name; a site without an entry is judged by its weights.
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


def inputs_of_role(
    role: str, sites: Sequence[SitePlan], curvatures: Mapping[str, Curvature]
) -> Inputs | None:
    """Return what is known about what a role's matrix reads, or None where nothing is."""
    for site in sites:
        if role in site.members and site.site in curvatures:
            return curvatures[site.site].inputs
    return None
