"""Factor pairs in a PyTorch model: what the members of a site share, and the members that read it.

The members of a joint group keep their places (`q_proj`, `k_proj`) and share the factors, which are registered
once beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class JointFactors(nn.Module):
    """y_i = B_i A x + b_i for matrices that share their input (2402.16319).

    Args:
        down: A, a linear module (in -> k) without bias.
        ups: B_i by role, linear modules (k -> out_i) that carry the biases.
    """

    def __init__(self, down: nn.Module, ups: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.down = down
        self.ups = nn.ModuleDict(ups)

    def member(self, role: str, x: Tensor) -> Tensor:
        """Return y of one member, (..., out_i)."""
        output: Tensor = self.ups[role](self.down(x))
        return output

    @property
    def rank(self) -> int:
        """The inner dimension k."""
        return int(self.down.out_features)  # type: ignore[arg-type]

    def pairs(self) -> Iterator[JointFactors]:
        """Yield the factor pairs: this one."""
        yield self


class GroupedFactors(nn.Module):
    """One factor pair per KV group; the outputs of a member stand side by side (2402.16319, QK per head)."""

    def __init__(self, groups: list[JointFactors]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def member(self, role: str, x: Tensor) -> Tensor:
        """Return y of one member, (..., out_i), heads in their original order."""
        return torch.cat([pair.member(role, x) for pair in self.pairs()], dim=-1)

    def pairs(self) -> Iterator[JointFactors]:
        """Yield the factor pairs in the order of the KV groups."""
        for pair in self.groups:
            assert isinstance(pair, JointFactors)
            yield pair


class IdentityFactors(nn.Module):
    """z = D x, y = [z; C z] in the members' order, plus biases: some outputs are z themselves (2501.19090).

    Args:
        down: D, the pivot rows, a linear module (in -> k) without bias.
        rest: C, the coefficients of all other rows, a linear module (k -> sum of out_i - k) without bias.
        orders: By role, where in [z; C z] each output of the member stands, integers (out_i,).
        biases: By role, (out_i,) or None.
    """

    def __init__(
        self,
        down: nn.Module,
        rest: nn.Module,
        orders: Mapping[str, Tensor],
        biases: Mapping[str, Tensor | None],
    ) -> None:
        super().__init__()
        self.down = down
        self.ups = nn.ModuleDict({"rest": rest})
        self.roles = tuple(orders)
        for role, order in orders.items():
            self.register_buffer(f"order_{role}", order.to(torch.int32))
            bias = biases[role]
            parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            self.register_parameter(f"bias_{role}", parameter)

    def order(self, role: str) -> Tensor:
        """Where in [z; C z] each output of a member stands, int32 (out_i,)."""
        order: Tensor = getattr(self, f"order_{role}")
        return order

    def bias(self, role: str) -> Tensor | None:
        """The bias of a member, (out_i,), or None."""
        bias: Tensor | None = getattr(self, f"bias_{role}")
        return bias

    def member(self, role: str, x: Tensor) -> Tensor:
        """Return y of one member, (..., out_i)."""
        z = self.down(x)
        y = torch.cat([z, self.ups["rest"](z)], dim=-1).index_select(-1, self.order(role))
        bias = self.bias(role)
        return y if bias is None else y + bias

    def runs(self, role: str) -> list[tuple[int, int]]:
        """The stretches (start, end) of [z; C z] that make up a member, cut where C z begins."""
        runs: list[tuple[int, int]] = []
        for place in self.order(role).tolist():
            if runs and place == runs[-1][1] and place != self.rank:
                runs[-1] = (runs[-1][0], place + 1)
            else:
                runs.append((place, place + 1))
        return runs

    @property
    def rank(self) -> int:
        """The inner dimension k."""
        return int(self.down.out_features)  # type: ignore[arg-type]

    def pairs(self) -> Iterator[IdentityFactors]:
        """Yield the factor pairs: this one."""
        yield self


SharedFactors = JointFactors | GroupedFactors | IdentityFactors


class JointMember(nn.Module):
    """Stands where a member's linear layer stood and reads its share of the factors.

    The factors are owned by the parent module, so this holds them outside the module tree: their tensors
    appear once in the state dict.
    """

    def __init__(self, factors: SharedFactors, role: str) -> None:
        super().__init__()
        self.role = role
        self._factors = (factors,)

    @property
    def factors(self) -> SharedFactors:
        """The shared factors."""
        return self._factors[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.factors.member(self.role, x)
