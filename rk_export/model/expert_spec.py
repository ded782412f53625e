"""What a mixture of experts computes: how a token chooses its experts, and how what they return is mixed."""

from __future__ import annotations

from dataclasses import dataclass

SPARSE_MIXER_EXPERTS = 2  # whatever the config says


@dataclass(frozen=True)
class SoftmaxRouting:
    """The likeliest experts, weighted by their probabilities.

    A softmax over the scores of the chosen experts alone is the normalized form: both divide by their sum.

    Args:
        normalized: The weights of the chosen experts are divided by their sum.
    """

    normalized: bool


@dataclass(frozen=True)
class CorrectedRouting:
    """The experts with the largest sum of probability and a stored correction, weighted by their probabilities.

    Args:
        smallest_sum: The weights are divided by their sum, or by this where the sum is smaller.
    """

    smallest_sum: float


@dataclass(frozen=True)
class SparseMixerRouting:
    """Two experts; each is weighted by its probability among those whose scores are close to its own (2409.12136).

    Args:
        tolerance: Scores that are further from the expert's own than this share are left out.
    """

    tolerance: float


Routing = SoftmaxRouting | CorrectedRouting | SparseMixerRouting


@dataclass(frozen=True)
class SharedExpert:
    """The MLP that every token runs through beside its experts.

    Args:
        intermediate_size: Its width.
        has_gate: Its output is multiplied by the sigmoid of a learned score of the token.
        has_bias: Its matrices have biases.
    """

    intermediate_size: int
    has_gate: bool = False
    has_bias: bool = False


@dataclass(frozen=True)
class ExpertSpec:
    """Mixture of experts.

    Args:
        count: Number of experts.
        per_token: How many of them a token runs through.
        intermediate_size: Width of an expert.
        routing: How a token chooses, and weighs what they return.
        shared: The MLP beside them; None = there is none.
    """

    count: int
    per_token: int
    intermediate_size: int
    routing: Routing
    shared: SharedExpert | None = None
