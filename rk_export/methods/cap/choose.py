"""Global rank and sparsity optimization (2505.03801): from a budget to low rank plus sparse for every matrix."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.baselines import magnitude, wanda
from rk_export.methods.cap.mixture import cheapest, mixture_selection, offered_mixtures
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.cap.policy import first_probabilities, learn
from rk_export.methods.cap.pools import Pools, flat_prices, make_pools, selected, taken_within
from rk_export.methods.cap.scores import all_scores, curvature_score, energy_score, largest_scores
from rk_export.methods.sparse_sites import (
    Prices,
    amount_of,
    check_source,
    keeps_nothing,
    log_choice,
    share_of_entries,
)
from rk_export.options.ranks import Budget
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.numerics.threads import total
from rk_export.source.protocol import Source


def cap_parts(
    source: Source,
    budget: Budget,
    options: CapOptions,
    *,
    tokens: Tensor | None,
    statistics: DenseStatistics | None,
    device: torch.device,
    prices: Prices | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[MatrixId, Parts]:
    """Choose rank and sparse entries of every matrix of the decoder layers.

    See `CapOptions.selector` for what chooses.

    Args:
        source: The dense model.
        budget: `keep` is the share of the matrices' parameters that may remain, a direction of an (out, in) matrix
            counted as out + in and an entry as one; `size` is the bytes that they may take.
        options: How matrices are split, and what chooses.
        tokens: Calibration text, int64 (sequences, length), without padding; the policy needs it.
        statistics: Of the dense model; `auction` and `wanda` need them. The pools' candidates are worth what they
            say, or their energies without them.
        device: Where matrices are split, and the policy's model runs.
        prices: Bytes of what is stored, for `size`; `BYTES` when None.
        cache_dir: The cache of pools, policies and mixtures; ``~/.cache/rk-export`` when None.

    Returns:
        The parts by layer index and path in the canonical layer; on the CPU, mapped, float32.

    Raises:
        InputError: If the model is an encoder or has experts, or the budget keeps nothing, or holds everything.
    """
    check_source(source, options.name)
    amount, prices = amount_of(source, budget, prices)
    if options.selector in ("policy", "pools"):
        pools = make_pools(source, options.iterations, device, cache_dir)
        check_pools(pools, amount, budget, prices)
        score = energy_score(prices) if statistics is None else curvature_score(prices, statistics)
    if options.selector == "policy":
        if tokens is None:
            raise ValueError("the policy needs calibration text")
        first = first_probabilities(pools, all_scores(score, pools), prices, amount)
        learned = learn(
            source, pools, first, amount, prices, options, tokens=tokens, device=device, cache_dir=cache_dir
        )
        parts = most_probable(pools, learned.probabilities, amount, prices)
    elif options.selector == "pools":
        parts = largest_scores(score, pools, amount, prices)
    elif options.selector == "magnitude":
        parts = magnitude(source, share_of_entries(source, amount, prices))
    elif statistics is None:
        raise ValueError(f"{options.selector} needs the statistics of the dense model")
    elif options.selector == "wanda":
        parts = wanda(source, share_of_entries(source, amount, prices), statistics)
    else:
        offered = offered_mixtures(source, statistics, device, cache_dir)
        if cheapest(offered, prices) > amount:
            raise keeps_nothing(budget)
        parts = mixture_selection(source, offered, amount, prices, statistics, device, cache_dir)
    log_choice(parts)
    return parts


def check_pools(pools: Pools, amount: float, budget: Budget, prices: Prices) -> None:
    """Refuse a budget that leaves nothing to choose.

    Raises:
        InputError: If all candidates fit, or none does.
    """
    cost = flat_prices(pools, prices)
    whole = float(total(cost))
    if not len(cost) or float(cost.min()) > amount:
        raise keeps_nothing(budget)
    if whole <= amount:
        raise InputError(
            f"all candidates cost {whole:.4g}, the budget is {amount:.4g}: there is nothing to choose",
            where=budget.flag,
            fix="give less, or leave the matrices dense",
        )


def most_probable(
    pools: Pools, probabilities: Tensor, amount: float, prices: Prices
) -> dict[MatrixId, Parts]:
    """Return the parts of the most probable candidates of a model that the budget buys."""
    return selected(pools, taken_within(probabilities, flat_prices(pools, prices), amount))
