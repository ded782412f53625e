"""Torch layers in canonical form: every weight matrix is an ``nn.Linear`` of its own.

Hugging Face stores some matrices joined (``qkv_proj``, ``gate_up_proj``, ``c_attn``), transposed (``Conv1D``)
or stacked over experts. The rewrites below replace those modules in place, leave the layer's function
unchanged and also work on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class JoinedLinear(nn.Module):
    """Several ``nn.Linear`` on one input, called like the joined matrix they came from.

    The children are called, never read, so that each can be replaced by any module with the call of
    ``nn.Linear``.

    Args:
        children: By name, in the order of their rows.
        groups: Equal blocks of rows in the joined matrix; each holds a part of every child, such as one head of each.
    """

    def __init__(self, children: Mapping[str, nn.Linear], groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs in the order of the joined rows: (..., in) -> (..., sum of the children's out)."""
        return self.joined([child(x) for child in self.children()], dim=-1)

    def joined(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """Return what belongs to each child as one tensor in the order of the joined rows.

        Args:
            parts: One a child, in their order.
            dim: The dimension of the rows: 0, or -1 as the last.
        """
        grouped = [torch.unflatten(part, dim, (self.groups, -1)) for part in parts]
        inner = dim if dim < 0 else dim + 1
        return torch.cat(grouped, dim=inner).flatten(inner - 1, inner)


class EachHeadNorm(nn.Module):
    """LayerNorm over each head, with gains of its own and no shift; called like StableLM's norms of heads.

    Args:
        norms: One for each head, of one epsilon.
    """

    def __init__(self, norms: nn.ModuleList) -> None:
        super().__init__()
        first = cast(nn.LayerNorm, norms[0])
        self.eps, self.width = first.eps, first.normalized_shape
        self.weight = nn.Parameter(
            torch.stack([cast(torch.Tensor, norm.weight).detach() for norm in norms]),
            requires_grad=first.weight.requires_grad,
        )

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Normalize each head: (batch, heads, length, width) to the same shape."""
        normed = nn.functional.layer_norm(heads, self.width, eps=self.eps)
        return normed * self.weight[:, None]


class ExpertMLP(nn.Module):
    """One gated expert: ``down(act(gate(x)) * up(x))``."""

    def __init__(
        self,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        *,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (tokens, hidden) to (tokens, hidden)."""
        return cast(torch.Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.ModuleList):
    """Experts as separate modules ``0``, ``1``, ..., called like Hugging Face's stacked experts."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), the expert numbers.
            top_k_weights: (tokens, k), their weights.

        Returns:
            (tokens, hidden).
        """
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, choice = torch.where(top_k_index == number)
            if len(token) == 0:
                continue
            weighted = expert(hidden_states[token]) * top_k_weights[token, choice, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result


def split_linear(linear: nn.Linear, parts: Mapping[str, int], groups: int = 1) -> JoinedLinear:
    """Cut a linear by output rows into named parts.

    Args:
        linear: The joined layer, weight (sum of the parts, in).
        parts: Rows of each part, in the order of the rows.
        groups: Equal blocks of rows; each holds an equal share of every part.
    """
    sizes = list(parts.values())
    weights = cut_rows(linear.weight, sizes, groups)
    biases = [None] * len(sizes) if linear.bias is None else cut_rows(linear.bias, sizes, groups)
    children = {
        name: linear_from(weight, bias, training=linear.training)
        for name, weight, bias in zip(parts, weights, biases, strict=True)
    }
    return JoinedLinear(children, groups).train(linear.training)


def cut_rows(joined: torch.Tensor, sizes: Sequence[int], groups: int = 1) -> list[torch.Tensor]:
    """Cut a tensor by its first dimension into parts of some sizes; see `JoinedLinear` for the groups."""
    shares = [size // groups for size in sizes]
    blocks = torch.split(torch.unflatten(joined, 0, (groups, -1)), shares, dim=1)
    return [block.flatten(0, 1) for block in blocks]


def split_gate_up(joined: nn.Linear) -> JoinedLinear:
    """Cut the joined matrix of a gated MLP, weight (2 * intermediate, hidden), the rows of the gate first."""
    half = joined.out_features // 2
    return split_linear(joined, {"gate_proj": half, "up_proj": half})


def linear_from_conv1d(conv: Conv1D) -> nn.Linear:
    """Return the ``nn.Linear`` of a GPT-2 ``Conv1D``, whose weight is stored as (in, out)."""
    return linear_from(conv.weight.t(), conv.bias, training=conv.training)


def split_experts(experts: nn.Module) -> Experts:
    """Cut stacked experts into one module each.

    Args:
        experts: A module with ``gate_up_proj`` (experts, 2 * intermediate, hidden), gate rows first,
            ``down_proj`` (experts, hidden, intermediate) and ``act_fn``.
    """
    stacked = cast(nn.Parameter, experts.gate_up_proj)
    down = cast(nn.Parameter, experts.down_proj)
    activation = cast("Callable[[torch.Tensor], torch.Tensor]", experts.act_fn)
    modules = []
    for number in range(stacked.shape[0]):
        gate, up = stacked[number].chunk(2)
        linears = (linear_from(weight, None, training=False) for weight in (gate, up, down[number]))
        modules.append(ExpertMLP(*linears, act_fn=activation))
    return Experts(modules).train(experts.training)


def linear_from(weight: torch.Tensor, bias: torch.Tensor | None, *, training: bool) -> nn.Linear:
    """Return a linear that owns copies of ``weight`` (out, in) and ``bias`` (out)."""
    out_features, in_features = weight.shape
    # Created empty on meta: the initialization of nn.Linear would draw random numbers for nothing.
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = _copied(weight)
    if bias is not None:
        linear.bias = _copied(bias)
    return linear.train(training)


def _copied(tensor: torch.Tensor) -> nn.Parameter:
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad)
