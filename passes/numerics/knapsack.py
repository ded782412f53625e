"""Many small candidates under one budget: keep-probabilities projected onto it, and the largest scores that fit."""

from __future__ import annotations

from collections.abc import Iterator

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


def project_to_budget(
    s: Tensor, prices: Tensor, budget: float, out: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return the point nearest to s in {0 <= t <= 1, prices · t <= budget}, and the multiplier.

    The nearest point is clip(s - λ prices, 0, 1) with the smallest λ >= 0 that meets the budget. Its cost falls
    piecewise linearly in λ: Newton's steps find the zero, bisection takes over where they leave the bracket.

    Args:
        s: (candidates,), floats.
        prices: (candidates,), positive.
        budget: What the point may cost, at least 0.
        out: Where the point goes (candidates,), `s` itself perhaps; a new tensor when None.

    Raises:
        ValueError: If the budget is negative, or a price is not positive.
    """
    if budget < 0:
        raise ValueError(f"a budget of {budget}")
    if len(s) and not float(prices.min()) > 0:
        raise ValueError("a price is not positive")
    out = torch.empty_like(s) if out is None else out
    cost, slope = _cost(s, prices, 0.0)
    if cost <= budget:
        return torch.clamp(s, 0, 1, out=out), 0.0
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
    return torch.sub(s, prices, alpha=multiplier, out=out).clamp_(0, 1), multiplier


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


def largest_within(scores: Tensor, prices: Tensor, budget: float, out: Tensor | None = None) -> Tensor:
    """Return which candidates the budget buys, those of the largest scores first: bool (candidates,).

    Of equal scores the first comes first. Where a candidate is too dear for what is left, cheaper ones further
    down the list that still fit are taken instead. Only scores about the limit are sorted.

    Args:
        scores: (candidates,), float32; candidates of -inf are never taken.
        prices: (candidates,), positive.
        budget: What those taken may cost together.
        out: Where the answer goes; a new tensor when None.
    """
    taken = torch.empty(scores.shape, dtype=torch.bool, device=scores.device) if out is None else out
    taken.zero_()
    while True:
        spent = _take(scores, prices, taken, budget)
        if spent is None:
            return taken
        budget -= spent


def _take(scores: Tensor, prices: Tensor, taken: Tensor, budget: float) -> float | None:
    """Mark the longest prefix of the open candidates, by falling key, that the budget holds; return its cost.

    Open is what is not taken yet and no dearer than the budget; None where nothing is.
    """
    costs = torch.zeros(_BINS, dtype=torch.float64, device=scores.device)
    any_open = False
    for score, price, own in _pieces(scores, prices, taken):
        here = _open(score, price, own, budget)
        any_open = any_open or bool(here.any())
        weights = price[here].to(torch.float64)
        costs += torch.bincount(_bins(_ordered(score[here])), weights=weights, minlength=_BINS)
    if not any_open:
        return None
    above = costs.flip(0).cumsum(0)  # what the bins from the top on cost
    whole = int(torch.searchsorted(above, budget, right=True))
    boundary = _BINS - 1 - whole
    inside, keys, begin = [], [], 0
    for score, price, own in _pieces(scores, prices, taken):
        here, key = _open(score, price, own, budget), _ordered(score)
        bins = _bins(key)
        places = (here & (bins == boundary)).nonzero()[:, 0]
        inside.append(begin + places)
        keys.append(key[places])
        own |= here & (bins > boundary)
        begin += len(score)
    spent = float(above[whole - 1]) if whole else 0.0
    at_boundary = torch.cat(inside)[torch.argsort(torch.cat(keys), descending=True, stable=True)]
    total = spent + prices[at_boundary].to(torch.float64).cumsum(0)
    count = int(torch.searchsorted(total, budget, right=True))
    taken[at_boundary[:count]] = True
    return float(total[count - 1]) if count else spent


def _pieces(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of tensors of one length, some elements at a time."""
    return zip(*(torch.split(item, _CHUNK) for item in flat), strict=True)


def _open(scores: Tensor, prices: Tensor, taken: Tensor, budget: float) -> Tensor:
    return (scores > -torch.inf) & (prices <= budget) & ~taken


def _bins(keys: Tensor) -> Tensor:
    return (keys >> _LOW_BITS) + _BINS // 2


def _ordered(scores: Tensor) -> Tensor:
    """Return int32 keys in the order of float32 scores: the bits, with those of negative numbers turned around."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def logistic_probabilities(
    scores: Tensor, prices: Tensor, budget: float, temperature: float, out: Tensor | None = None
) -> Tensor:
    """Return s = σ((score - θ) / temperature) with the θ at which prices · s is the budget.

    Args:
        scores: (candidates,), float32, finite.
        prices: (candidates,), positive.
        budget: What the probabilities may cost together.
        temperature: In the scores' unit; the lower, the fewer candidates are in doubt.
        out: Where the probabilities go, `scores` itself perhaps; a new tensor when None.
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
    out = torch.empty_like(scores) if out is None else out
    for score, place in _pieces(scores, out):
        torch.sigmoid((score - high) / temperature, out=place)
    return project_to_budget(out, prices, budget, out)[0]
