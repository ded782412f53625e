"""Many small candidates under one budget: keep-probabilities projected onto it, and the largest scores that fit."""

from __future__ import annotations

import torch
from torch import Tensor

from rk_export.passes.numerics.threads import total

_EVALUATIONS = 200
# Relative to the budget; sums are taken in float64.
_TOLERANCE = 1e-9
# Elements that are worked on together: temporaries of tens of millions of candidates stay small.
_CHUNK = 1 << 21
# Scores are first told apart by the upper half of their bits.
_BINS, _LOW_BITS = 1 << 16, 16


def project_to_budget(s: Tensor, prices: Tensor, budget: float) -> tuple[Tensor, float]:
    """Return the point nearest to s in {0 <= t <= 1, prices · t <= budget}, and the multiplier.

    The nearest point is clip(s - λ prices, 0, 1) with the smallest λ >= 0 that meets the budget. Its cost falls
    piecewise linearly in λ: Newton's steps find the zero, bisection takes over where they leave the bracket.

    Args:
        s: (candidates,), floats.
        prices: (candidates,), positive.
        budget: What the point may cost, at least 0.

    Raises:
        ValueError: If the budget is negative, or a price is not positive.
    """
    if budget < 0:
        raise ValueError(f"a budget of {budget}")
    if len(s) and not float(prices.min()) > 0:
        raise ValueError("a price is not positive")
    cost, slope = _cost(s, prices, 0.0)
    if cost <= budget:
        return s.clamp(0, 1), 0.0
    multiplier, low, high = 0.0, 0.0, _to_nothing(s, prices)
    for _ in range(_EVALUATIONS):
        newton = multiplier + (cost - budget) / slope if slope > 0 else high
        multiplier = newton if low < newton < high else (low + high) / 2
        cost, slope = _cost(s, prices, multiplier)
        if cost > budget:
            low = multiplier
        else:
            high = multiplier
        if abs(cost - budget) <= _TOLERANCE * budget or high - low <= 1e-15 * high:
            break
    multiplier = multiplier if cost <= budget * (1 + _TOLERANCE) else high
    return torch.sub(s, prices, alpha=multiplier).clamp_(0, 1), multiplier


def _to_nothing(s: Tensor, prices: Tensor) -> float:
    """Return the multiplier at which every coordinate is zero."""
    pairs = zip(torch.split(s, _CHUNK), torch.split(prices, _CHUNK), strict=True)
    return max(float((part / price).max()) for part, price in pairs)


def _cost(s: Tensor, prices: Tensor, multiplier: float) -> tuple[float, float]:
    """Return what clip(s - λ prices, 0, 1) costs, and how fast that falls with λ."""
    cost = slope = 0.0
    for part, price in zip(torch.split(s, _CHUNK), torch.split(prices, _CHUNK), strict=True):
        t = torch.sub(part, price, alpha=multiplier)
        inside = (t > 0) & (t < 1)
        cost += float(total(t.clamp_(0, 1) * price))
        slope += float(total(price.square() * inside))
    return cost, slope


def largest_within(scores: Tensor, prices: Tensor, budget: float) -> Tensor:
    """Return which candidates the budget buys, those of the largest scores first: bool (candidates,).

    Of equal scores the first comes first. Where a candidate is too dear for what is left, cheaper ones further
    down the list that still fit are taken instead. Only scores about the limit are sorted.

    Args:
        scores: (candidates,), float32; candidates of -inf are never taken.
        prices: (candidates,), positive.
        budget: What those taken may cost together.
    """
    keys = _ordered(scores)
    open_ = scores > -torch.inf
    taken = torch.zeros_like(open_)
    while True:
        open_ &= prices <= budget
        if not bool(open_.any()):
            return taken
        budget -= _take(keys, prices, open_, taken, budget)
        open_ &= ~taken


def _take(keys: Tensor, prices: Tensor, open_: Tensor, taken: Tensor, budget: float) -> float:
    """Mark the longest prefix of the open candidates, by falling key, that the budget holds; return its cost."""
    bins = (keys >> _LOW_BITS) + _BINS // 2
    costs = torch.zeros(_BINS, dtype=torch.float64, device=keys.device)
    for part, price, here in zip(*(torch.split(item, _CHUNK) for item in (bins, prices, open_)), strict=True):
        costs += torch.bincount(part[here], weights=price[here].to(torch.float64), minlength=_BINS)
    above = costs.flip(0).cumsum(0)  # what the bins from the top on cost
    whole = int(torch.searchsorted(above, budget, right=True))
    boundary = _BINS - 1 - whole
    taken |= open_ & (bins > boundary)
    spent = float(above[whole - 1]) if whole else 0.0
    inside = (open_ & (bins == boundary)).nonzero()[:, 0]
    inside = inside[torch.argsort(keys[inside], descending=True, stable=True)]
    total = spent + prices[inside].to(torch.float64).cumsum(0)
    count = int(torch.searchsorted(total, budget, right=True))
    taken[inside[:count]] = True
    return float(total[count - 1]) if count else spent


def _ordered(scores: Tensor) -> Tensor:
    """Return int32 keys in the order of float32 scores: the bits, with those of negative numbers turned around."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def logistic_probabilities(scores: Tensor, prices: Tensor, budget: float, temperature: float) -> Tensor:
    """Return s = σ((score - θ) / temperature) with the θ at which prices · s is the budget.

    Args:
        scores: (candidates,), float32, finite.
        prices: (candidates,), positive.
        budget: What the probabilities may cost together.
        temperature: In the scores' unit; the lower, the fewer candidates are in doubt.
    """
    low, high = float(scores.min()), float(scores.max())
    step = max((high - low) / (_BINS - 1), 1e-30)
    weights = torch.zeros(_BINS, dtype=torch.float64, device=scores.device)
    for part, price in zip(torch.split(scores, _CHUNK), torch.split(prices, _CHUNK), strict=True):
        bins = ((part - low) / step).round().long().clamp(0, _BINS - 1)
        weights += torch.bincount(bins, weights=price.to(torch.float64), minlength=_BINS)
    centres = low + step * torch.arange(_BINS, dtype=torch.float64, device=scores.device)
    reach = 40 * temperature
    low, high = low - reach, high + reach
    for _ in range(100):
        middle = (low + high) / 2
        if float(weights @ torch.sigmoid((centres - middle) / temperature)) > budget:
            low = middle
        else:
            high = middle
    # The bins round; the projection makes up for it.
    return project_to_budget(torch.sigmoid((scores - high) / temperature), prices, budget)[0]
