"""What a budget chooses by: candidates come out in the order of the losses that are predicted for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from compressed import floats, logits
from made_recipes import open_recipe
from ranking import rank_correlation
from torch import Tensor

from rk_export import Budget
from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.layer_statistics import FromDense
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.model.sites import dense_sites
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import SINGLE_GROUPS
from rk_export.plan import Plan, SitePlan
from rk_export.planning.budget_units import budget_unit
from rk_export.planning.candidates import Candidate, candidates
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.apply import rewrite
from rk_export.source.protocol import Source

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RANK_STEP = 32
BUDGET = open_recipe(Budget("mean_bits", 4.5), groups=SINGLE_GROUPS)


@dataclass(frozen=True)
class Outcome:
    """A candidate, alone in an otherwise dense model, and what it does to the model's distribution."""

    candidate: Candidate
    divergence: float


def search_spaces(source: Source, statistics: DenseStatistics) -> list[list[Candidate]]:
    """Return what a budget of bytes chooses from at every site; the dense matrix in floats, is left out."""
    space = budget_unit(source, BUDGET, RANK_STEP).space
    found = []
    for layer in source.layers():
        sites = dense_sites(layer, source.description.projections(layer.index), BUDGET)
        for site, curvature in zip(sites, statistics.of_sites(sites), strict=True):
            weights = [layer.linear(path).weight for path in site.paths]
            shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
            offered = candidates(site, torch.cat(weights), shapes, curvature, space)
            found.append([item for item in offered if item.loss > 0])
    return found


def alone(plan: Plan, site: SitePlan) -> Plan:
    """Return a dense plan with one site changed."""
    return replace(plan, sites=tuple(site if other.site == site.site else other for other in plan.sites))


@pytest.fixture(scope="module", params=["llama"])
def outcomes(
    request: pytest.FixtureRequest,
    source_of: Callable[..., Source],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[list[Outcome]]:
    """Every candidate of every site, measured on the calibration text itself."""
    source = source_of(request.param, num_hidden_layers=2)
    tokens = torch.randint(3, 160, (32, 32), generator=torch.Generator().manual_seed(2))
    cache: Path = tmp_path_factory.mktemp("statistics")
    statistics = dense_statistics(
        source,
        tokens,
        diagonal=False,
        device=CPU,
        dtype=torch.float32,
        cache_dir=cache,
    )
    wanted = logits(source.load(), tokens).double().log_softmax(-1)
    rounded = floats(quant=QuantSpec(4, 32))  # a recipe that rounds to nearest, as the losses are predicted
    plan = replace(decide_plan(source, floats()), recipe=rounded)

    def divergence(candidate: Candidate) -> float:
        rewritten = rewrite(source, alone(plan, candidate.plan), statistics=FromDense(statistics))
        found: Tensor = logits(rewritten.model, tokens).double().log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    sites = search_spaces(source, statistics)
    return [[Outcome(candidate, divergence(candidate)) for candidate in site] for site in sites]


def correlation(outcomes: list[Outcome]) -> float:
    return rank_correlation(
        [outcome.candidate.loss for outcome in outcomes], [outcome.divergence for outcome in outcomes]
    )


def test_all_candidates_of_a_model(outcomes: list[list[Outcome]]) -> None:
    everything = [outcome for site in outcomes for outcome in site]
    assert len(everything) > 100
    assert correlation(everything) > 0.97


def test_candidates_of_one_site(outcomes: list[list[Outcome]]) -> None:
    """Which form, rank and format of a matrix loses least."""
    for site in outcomes:
        assert len(site) >= 8
        assert correlation(site) > 0.85, site[0].candidate.plan.site


def test_one_choice_for_every_site(outcomes: list[list[Outcome]]) -> None:
    """Which matrix bears a format or a rank best: where a byte is spent."""
    by_title: dict[str, list[Outcome]] = {}
    for outcome in (outcome for site in outcomes for outcome in site):
        by_title.setdefault(outcome.candidate.title, []).append(outcome)
    everywhere = {title: found for title, found in by_title.items() if len(found) == len(outcomes)}
    assert len(everywhere) >= 8
    for title, found in everywhere.items():
        assert correlation(found) > 0.8, title
