"""Whether predictions put things in the order in which they come out: what a choice under a budget needs."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import spearmanr


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return Spearman's rank correlation: 1 for the same order, about 0 ± 1/sqrt(n) for a random one."""
    assert len(set(measured)) > len(measured) / 2, "equal values have no order"
    return float(spearmanr(predicted, measured).statistic)
