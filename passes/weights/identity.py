"""From the factors of a site to its identity form: pivot rows, coefficients, and the order of the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rk_export.passes.base import Layer
from rk_export.passes.modules.factors import IdentityFactors
from rk_export.passes.modules.quantized import linear_of
from rk_export.passes.numerics.identity_form import IdentityForm, identity_form
from rk_export.passes.numerics.joint_svd import Factors
from rk_export.plan import SitePlan


@dataclass(frozen=True)
class BuiltIdentity:
    """The identity form of a site.

    Args:
        factors: The module, its members in the order that `neurons` says.
        form: The matrices and how well they are conditioned.
        neurons: The present number of each future neuron, int64 (neurons,); None if the outputs keep their order.
    """

    factors: IdentityFactors
    form: IdentityForm
    neurons: Tensor | None


def identity_factors(layer: Layer, plan: SitePlan, factors: Factors, *, as_neurons: bool) -> BuiltIdentity:
    """Return the identity form of a site's factors.

    Args:
        layer: The layer, whose matrices tell the sizes and the biases.
        plan: The site.
        factors: B A of the stacked members.
        as_neurons: Let the outputs come in the order of the pivots, the same for all members; the caller
            renumbers what reads them. Otherwise they keep their order, at the price of a Gather.
    """
    linears = {role: layer.linear(path) for role, path in zip(plan.members, plan.paths, strict=True)}
    home = next(iter(linears.values())).weight.device
    sizes = [linear.out_features for linear in linears.values()]
    form = identity_form(factors.up, factors.down, paired=as_neurons and len(linears) == 2)
    biases = {role: None if linear.bias is None else linear.bias.clone() for role, linear in linears.items()}
    orders = torch.split(form.order, sizes)
    neurons = None
    if as_neurons:
        # Each member's pivots, then its other rows, both by rising neuron number.
        neurons = torch.cat([rows[rows < sizes[0]] for rows in (form.pivots, form.others)])
        orders = tuple(order[neurons] for order in orders)
        index = neurons.to(home)
        biases = {role: None if bias is None else bias[index] for role, bias in biases.items()}
    module = IdentityFactors(
        linear_of(form.down.to(home)),
        linear_of(form.coefficients.to(home)),
        {role: order.to(home) for role, order in zip(linears, orders, strict=True)},
        biases,
    )
    return BuiltIdentity(module, form, neurons)


def empty_identity(members: Mapping[str, nn.Linear], rank: int) -> IdentityFactors:
    """Return the identity form of the planned shapes on the meta device, for loading a saved model."""
    columns = next(iter(members.values())).in_features
    rows = sum(linear.out_features for linear in members.values())
    return IdentityFactors(
        nn.Linear(columns, rank, bias=False, device="meta"),
        nn.Linear(rank, rows - rank, bias=False, device="meta"),
        {role: torch.empty(linear.out_features, device="meta") for role, linear in members.items()},
        {role: linear.bias for role, linear in members.items()},
    )
