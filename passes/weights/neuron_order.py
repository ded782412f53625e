"""Renumbering of a layer's FFN neurons: rows of gate and up, columns of down; the function stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from rk_export.passes.base import Layer
from rk_export.passes.modules.quantized import linear_of
from rk_export.passes.numerics.curvature import Curvature
from rk_export.plan import SitePlan

NEURON_ROLES = ("gate", "up")


def obstacle(layer: Layer, plan: SitePlan, paths: Mapping[str, str]) -> str:
    """Return why a site's outputs cannot be renumbered, or an empty string.

    Args:
        layer: The layer.
        plan: A site that is about to be rewritten.
        paths: The path of each FFN matrix by role.
    """
    if not set(plan.members) <= set(NEURON_ROLES):
        return "its outputs are no neurons"
    for role in _others(plan, paths):
        if role not in paths:
            return f"the layer's {role} matrix is not known"
        if not isinstance(layer.at(paths[role]), nn.Linear):
            return f"{role} is rewritten already"
    return ""


def renumber(layer: Layer, plan: SitePlan, paths: Mapping[str, str], order: Tensor) -> None:
    """Renumber the neurons in the FFN matrices that are not the site's own.

    Args:
        layer: The layer; no `obstacle` may stand in the way.
        plan: The site, whose own outputs the caller orders alike.
        paths: The path of each FFN matrix by role.
        order: The present number of each future neuron, int64 (neurons,).
    """
    for role in _others(plan, paths):
        linear = layer.linear(paths[role])
        index = order.to(linear.weight.device)
        if role == "down":
            permuted = linear_of(linear.weight[:, index], linear.bias)
        else:
            permuted = linear_of(linear.weight[index], None if linear.bias is None else linear.bias[index])
        layer.replace(paths[role], permuted)


def renumbered(curvature: Curvature, plan: SitePlan, order: Tensor) -> Curvature:
    """Return a curvature that was gathered before the neurons were renumbered as it is afterwards."""
    inputs = curvature.inputs
    if plan.members == ("down",):
        cross = None if inputs.cross is None else _permuted(inputs.cross, order)
        inputs = replace(inputs, second=_permuted(inputs.second, order), cross=cross)
    outputs = {
        role: _permuted(moment, order) if role in NEURON_ROLES else moment
        for role, moment in curvature.outputs.items()
    }
    return replace(curvature, inputs=inputs, outputs=outputs)


def _others(plan: SitePlan, paths: Mapping[str, str]) -> list[str]:
    """Return the roles, down among them, whose matrices must follow; an MLP without a gate has none."""
    return [*(role for role in NEURON_ROLES if role in paths and role not in plan.members), "down"]


def _permuted(moment: Tensor, order: Tensor) -> Tensor:
    index = order.to(moment.device)
    return moment[index] if moment.ndim == 1 else moment[index][:, index]
