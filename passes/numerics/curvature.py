"""What weighs the errors of matrices that read the same input: the curvature of the loss, in Kronecker factors.

With C the second moment of the inputs and G that of the loss' gradients by the outputs, replacing W by W + E
raises the mean loss by about tr(G E C Eᵀ) / 2, up to a scale (1503.05671).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from rk_export.passes.numerics.metric import Metric, conditional_variances
from rk_export.passes.numerics.threads import total


@dataclass(frozen=True)
class Inputs:
    """What matrices read; those that read the same share one object, and what is derived from it.

    Args:
        second: C, the mean over tokens of x xᵀ, (in, in), or (in,) where only its diagonal is known; x an input in
            the model as it is compressed so far.
        cross: Mean of x₀ xᵀ, (in, in), x₀ the same token's input in the dense model; None where the two agree.
        token_peak: Mean over tokens of the squared largest input, which sets the step of int8 inputs; 0 if unknown.
        tokens: How many tokens were averaged; 0 where the moments were derived from weights alone.
    """

    second: Tensor
    cross: Tensor | None = None
    token_peak: float = 0.0
    tokens: int = 0

    def to(self, device: torch.device) -> Inputs:
        """Return the same on a device."""
        second = self.second.to(device)
        if second is self.second:
            return self
        return replace(self, second=second, cross=None if self.cross is None else self.cross.to(device))

    @cached_property
    def metric(self) -> Metric:
        """The damped metric of C."""
        return Metric.of(self.second)

    @cached_property
    def alone(self) -> Tensor:
        """What a unit of squared error in each column costs (in,), float64, where columns are rounded on their own."""
        return _diagonal(self.second).to(torch.float64)

    @cached_property
    def compensated(self) -> Tensor:
        """The same where later columns make up for the error of earlier ones (2210.17323).

        Only what they cannot explain is left: the variance of an input given those rounded later, the squared
        diagonal of a Cholesky factor.
        """
        return conditional_variances(self.second)

    def column_weights(self, *, compensated: bool) -> Tensor:
        """Return what a unit of squared error in each column costs (in,), as the quantizer leaves it."""
        return self.compensated if compensated else self.alone

    def aimed(self, W: Tensor) -> Tensor:
        """Return the map of the present inputs that comes closest to W x₀ (W itself without a cross moment)."""
        if self.cross is None:
            return W
        return self.metric.unweighted(self.metric.target(W, self.cross)).to(W.dtype)

    def mean_square(self, E: Tensor) -> float:
        """Return the mean of |E x|² for E (out, in)."""
        weighted = E * self.second if self.second.ndim == 1 else E @ self.second.to(E.dtype)
        return max(0.0, float(total(weighted * E)))

    def behind(self, down: Tensor) -> Inputs:
        """Return what is known about A x for A (k, in)."""
        weighted = self.metric.columns(down)
        return Inputs((weighted @ weighted.mT).to(torch.float32))


@dataclass(frozen=True)
class Curvature:
    """What is known about a group of matrices beside their weights, stacked to one W (out, in).

    Args:
        inputs: What W reads.
        outputs: G by the member's role, in stacking order: (out_i, out_i), or its diagonal (out_i,). Empty where no
            gradients were taken: all outputs then weigh alike.
        scale: What G is multiplied with, so that losses are in nats per token.
    """

    inputs: Inputs
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    scale: int = 1

    def to(self, device: torch.device) -> Curvature:
        """Return the same on a device."""
        outputs = {role: moment.to(device) for role, moment in self.outputs.items()}
        return replace(self, inputs=self.inputs.to(device), outputs=outputs)

    def of_rows(self, rows: Mapping[str, int], group: int) -> Curvature:
        """Return the curvature of one group of rows.

        Args:
            rows: Rows of each member in one group.
            group: Number of the group.

        Raises:
            ValueError: If only some members have gradient moments.
        """
        if not self.outputs:
            return self
        if missing := sorted(set(rows) - set(self.outputs)):
            raise ValueError(f"no gradient moment of {', '.join(missing)}")
        outputs = {}
        for role, size in rows.items():
            own, moment = slice(group * size, (group + 1) * size), self.outputs[role]
            outputs[role] = moment[own] if moment.ndim == 1 else moment[own, own]
        return replace(self, outputs=outputs)

    @cached_property
    def output_metric(self) -> Metric | None:
        """The damped metric of G, a block for each member; None where no gradients were taken."""
        if not self.outputs:
            return None
        return Metric.stacked(Metric.of(moment * self.scale) for moment in self.outputs.values())

    @property
    def output_weights(self) -> Tensor:
        """The diagonal of G over all members (out,), float64."""
        diagonals = [_diagonal(moment) * self.scale for moment in self.outputs.values()]
        return torch.cat(diagonals).to(torch.float64)

    @property
    def weighed(self) -> str:
        """What is weighed, for the report."""
        parts = {"inputs": True, "target": self.inputs.cross is not None, "outputs": bool(self.outputs)}
        return " and ".join(part for part, known in parts.items() if known)

    def loss(self, E: Tensor) -> float:
        """Return the predicted loss of an error E (out, in) under the damped metrics, in nats per token."""
        weighted = self.inputs.metric.columns(E)
        if self.output_metric is not None:
            weighted = self.output_metric.rows(weighted)
        return 0.5 * float(total(weighted.square()))


def _diagonal(moment: Tensor) -> Tensor:
    return moment if moment.ndim == 1 else moment.diagonal()
