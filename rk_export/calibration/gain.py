"""Second moments of what matrices read, estimated from weights alone: no token runs through the model.

Normalized hidden states are taken to be white, with unit mean square; the norm's gain (and bias) in front of a
matrix then gives its input's moment, which is carried on through v to o, and through gate and up to down.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rk_export.model.description import ModelDescription
from rk_export.model.layer_wiring import wiring_of
from rk_export.passes.base import Layer, role_paths
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.plan import SitePlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Moments:
    """Mean of x xᵀ (n, n) and of x (n,)."""

    second: Tensor
    mean: Tensor

    def through(self, linear: nn.Linear) -> _Moments:
        """Return the moments of W x + b."""
        weight = linear.weight.float()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.float()
        centre = weight @ self.mean
        second = weight @ self.second @ weight.T + torch.outer(bias, bias)
        return _Moments(second + torch.outer(centre, bias) + torch.outer(bias, centre), centre + bias)


@torch.no_grad()
def gain_statistics(
    layer: Layer, sites: Sequence[SitePlan], description: ModelDescription
) -> dict[str, Curvature]:
    """Estimate the input moments of a dense layer's sites.

    Three steps are approximations. o reads averages of values over tokens: they are taken to have the values' own
    moments, and different query heads, which look at different tokens, to be uncorrelated. down reads
    act(gate) * up: its moment is taken to be diagonal, the product of gate's and up's mean squares (of up's alone
    where there is no gate), which leaves the activation out. The output of a short convolution reads three factors and
    sums products over tokens: they are all taken to be independent.

    Args:
        layer: The layer, still dense.
        sites: All sites of the layer.
        description: Of its model.

    Returns:
        Curvatures by site name, with `tokens` 0. Sites that no norm stands in front of have none, and neither
        have experts; both are logged.
    """
    roles = role_paths(sites)
    read = _read_moments(layer, description)
    known = {role: read[path].second for role, path in roles.items() if path in read and role != "expert"}
    if {"v", "o"} <= roles.keys() and roles["v"] in read:
        known["o"] = _averaged_values(layer, read[roles["v"]].through(layer.linear(roles["v"])), roles["o"])
    if "conv_in" in roles and roles["conv_in"] in read:
        known["conv_out"] = _convolved(layer, read[roles["conv_in"]].through(layer.linear(roles["conv_in"])))
    mlp = [role for role in ("gate", "up") if role in known]
    if mlp:
        squares = [read[roles[role]].through(layer.linear(roles[role])) for role in mlp]
        known["down"] = torch.stack([item.second.diagonal() for item in squares]).prod(0).diag()
    found = {}
    for site in sites:
        if site.members[0] in known:
            found[site.site] = Curvature(Inputs(known[site.members[0]]))
        else:
            logger.info("%s: no statistics, no norm's gain tells what it reads", site.site)
    return found


def _read_moments(layer: Layer, description: ModelDescription) -> dict[str, _Moments]:
    """Return the moments of what each matrix behind a norm reads, by the matrix's path."""
    if description.architecture.is_encoder:
        return {}  # its norms follow the residual sums
    read: dict[str, _Moments] = {}
    for norm, paths in wiring_of(description, layer.index).norms.items():
        read |= dict.fromkeys(paths, _output_moments(layer.module.get_submodule(norm)))
    return read


def _output_moments(norm: nn.Module) -> _Moments:
    """Evaluate a norm on ±1 and on 1: gain, bias and whether it centres, however they are stored."""
    width = sum(parameter.numel() for name, parameter in norm.named_parameters() if name == "weight")
    ones = torch.ones(1, width, device=next(norm.parameters()).device)
    signs = ones.clone()
    signs[:, 1::2] = -1
    high, low = norm(signs)[0].float(), norm(-signs)[0].float()
    gain, bias = (high - low) / 2 * signs[0], (high + low) / 2
    constant = norm(ones)[0].float() - bias  # the gain behind an RMSNorm, zero behind a LayerNorm
    centring = (torch.outer(gain, gain) - torch.outer(constant, constant)) / width
    return _Moments(torch.diag(gain.square()) - centring + torch.outer(bias, bias), bias)


def _convolved(layer: Layer, projected: _Moments) -> Tensor:
    """Return the moment (in, in) of what conv_out reads, diagonal: c times taps over b times x."""
    b, c, x = projected.second.diagonal().chunk(3)
    taps = layer.module.get_submodule("conv.conv").get_parameter("weight")
    return (c * b * x * taps.float().square().sum((1, 2))).diag()


def _averaged_values(layer: Layer, values: _Moments, output: str) -> Tensor:
    """Return the moment (in, in) of what o reads: one block per query head, the mean value elsewhere."""
    head_dim = len(values.mean) // layer.kv_groups
    heads = layer.linear(output).in_features // head_dim
    of_head = torch.arange(heads, device=values.mean.device) // (heads // layer.kv_groups)
    features = (of_head[:, None] * head_dim + torch.arange(head_dim, device=of_head.device)).flatten()
    mean = values.mean[features]
    same_head = torch.arange(len(features), device=mean.device) // head_dim
    second = values.second[features][:, features]
    return torch.where(same_head[:, None] == same_head, second, torch.outer(mean, mean))
