"""Plans whose ranks follow from spectra, of the weights or under a metric, at one share of all groups together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.device import CPU
from rk_export.errors import InputError
from rk_export.model.sites import default_multiple, dense_sites
from rk_export.options.ranks import GROUPS
from rk_export.options.recipe import Recipe
from rk_export.passes.numerics.adaptive_ranks import DENSE, RankSite, adaptive_ranks
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.joint_svd import singular_values, whitened_singular_values
from rk_export.passes.numerics.ranks import round_rank
from rk_export.plan import Plan, SitePlan
from rk_export.progress import track
from rk_export.source.protocol import Source


def spectral_plan(
    source: Source,
    recipe: Recipe,
    statistics: DenseStatistics | None = None,
    device: torch.device = CPU,
) -> Plan:
    """Return the plan of an allocation: ranks in proportion to what its rule sees in each group's spectrum.

    Args:
        source: The dense model; all matrices of the groups are read.
        recipe: With groups, a share to keep and an allocation.
        statistics: Of the dense model: spectra are then those of the whitened groups. None takes the weights' own.
        device: Where the spectra are computed.

    Raises:
        InputError: If not even rank 1 everywhere fits into the share.
    """
    found = list(_sites(source, recipe, statistics, device))
    grouped = [shape for _, shape in found if shape is not None]
    factorize, rule = recipe.factorize, recipe.rank
    if rule is None:
        raise ValueError("an allocation spreads the share of a rank rule")
    identity = factorize.form == "identity"
    try:
        ranks = iter(adaptive_ranks(grouped, rule.value, factorize.allocation, identity=identity))
    except ValueError as error:
        raise InputError(str(error), where="factorize.keep", fix="keep more") from error
    sites = [site if shape is None else _ranked(site, shape, next(ranks), recipe) for site, shape in found]
    return Plan(source.config.model_type, source.structure(), recipe, tuple(sites), recipe.table_quant)


def _sites(
    source: Source, recipe: Recipe, statistics: DenseStatistics | None, device: torch.device
) -> Iterator[tuple[SitePlan, RankSite | None]]:
    """Yield all sites, dense, and the spectrum of those that are to be factorized."""
    grouped = {GROUPS[group] for group in recipe.groups or ()}
    for layer in track(source.layers(), "spectra of layers", source.layer_count):
        sites = dense_sites(layer, source.description.projections(layer.index), recipe)
        known = [None] * len(sites) if statistics is None else statistics.of_sites(sites, device)
        for site, curvature in zip(sites, known, strict=True):
            if site.members not in grouped:
                yield site, None
                continue
            stacked = torch.cat([layer.linear(path).weight for path in site.paths]).to(device)
            yield site, RankSite(_spectrum(stacked, curvature), stacked.shape[1], stacked.shape[0])


def _spectrum(W: Tensor, curvature: Curvature | None) -> Tensor:
    """Return the singular values of W (out, in), whitened on both sides where a curvature is known."""
    if curvature is None:
        return singular_values(W)
    return whitened_singular_values(W, curvature.inputs.metric, curvature.output_metric)


def _ranked(site: SitePlan, shape: RankSite, wanted: int, recipe: Recipe) -> SitePlan:
    if wanted == DENSE:
        return replace(
            site, reason=f"its spectrum asks for more than break-even ({recipe.factorize.allocation})"
        )
    rows, columns = shape.out_features, shape.in_features
    multiple = recipe.factorize.rank_multiple or default_multiple(columns, rows, site.quant)
    form: Literal["joint", "identity"] = "identity" if recipe.factorize.form == "identity" else "joint"
    rank = round_rank(wanted, multiple, min(rows, columns))
    return replace(site, form=form, rank=rank, correction=0)
