"""Ranks by spectra alone: one share of all groups together, spread by a rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_recipes import made_recipe
from torch import nn

from rk_export.commands.compression_inputs import compression_inputs
from rk_export.model.plain_form import plain_model
from rk_export.options.calibration import UNWEIGHED, CalibrationOptions
from rk_export.options.ranks import ALLOCATIONS, RankRule
from rk_export.plan import Plan
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.sizes import planned_findings
from rk_export.source.stored import StoredModel, open_source

SourceOf = Callable[..., StoredModel]
OPTIONS: dict[str, Any] = {
    "groups": ("qk", "gate_up"),
    "rank": RankRule("keep", 0.5),
    "rank_multiple": 1,
    "quant": None,
    "table": None,
    "prepare": (),
    "calibration": UNWEIGHED,
}


def plan_of(source: StoredModel, **changes: Any) -> Plan:
    return decide_plan(source, made_recipe(**{**OPTIONS, **changes}))


def kept(source: StoredModel, plan: Plan) -> float:
    """Return the share of the groups' bytes that a plan keeps."""
    grouped = {site.site for site in plan.sites if len(site.members) > 1}
    found = [item for item in planned_findings(source, plan) if item.target in grouped]
    return sum(item.bytes_after for item in found) / sum(item.bytes_before for item in found)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("form", ["plain", "identity"])
def test_every_rule_keeps_the_same_share(source_of: SourceOf, allocation: str, form: str) -> None:
    source = source_of("llama")
    assert 0.47 < kept(source, plan_of(source, allocation=allocation, form=form)) <= 0.5


@pytest.mark.parametrize("allocation", ["energy", "effective-rank", "stable-rank"])
def test_a_flatter_spectrum_gets_a_higher_rank(source_of: SourceOf, tmp_path: Path, allocation: str) -> None:
    source = source_of("llama")
    model = source.load()
    with torch.no_grad():
        for role in ("q", "k"):
            weight: Any = model.get_submodule(f"model.layers.0.self_attn.{role}_proj").weight
            nn.init.orthogonal_(weight)
            U, S, Vh = torch.linalg.svd(model.get_submodule(f"model.layers.1.self_attn.{role}_proj").weight)  # type: ignore[arg-type]
            decayed = (U[:, : len(S)] * (S * 0.8 ** torch.arange(len(S)))) @ Vh[: len(S)]
            model.get_submodule(f"model.layers.1.self_attn.{role}_proj").weight.copy_(decayed)  # type: ignore[operator]
    plain_model(model).save_pretrained(tmp_path / "changed")
    plan = plan_of(StoredModel(tmp_path / "changed", "changed"), allocation=allocation, groups=("qk",))
    ranks = {site.site: site.rank or 64 for site in plan.sites if site.members == ("q", "k")}
    assert ranks["layers.0.qk"] > ranks["layers.1.qk"]


def test_what_its_spectrum_asks_too_much_of_stays_dense_and_says_so(source_of: SourceOf) -> None:
    plan = plan_of(source_of("llama"), allocation="energy", rank=RankRule("keep", 0.99))
    dense = [site for site in plan.sites if len(site.members) > 1 and site.form == "dense"]
    assert dense
    assert all("break-even (energy)" in site.reason for site in dense)


def test_a_metric_whitens_the_spectra(llama: Path) -> None:
    source = open_source(llama)
    changes = {"allocation": "effective-rank", "calibration": CalibrationOptions(tokens=512)}
    asked = made_recipe(**{**OPTIONS, **changes})
    known = compression_inputs(source, asked).statistics
    assert known is not None
    plans = [decide_plan(source, asked, statistics=statistics) for statistics in (None, known)]
    ranks = [[site.rank for site in plan.sites] for plan in plans]
    assert ranks[0] != ranks[1]
    assert 0.47 < kept(source, plans[1]) <= 0.5


def test_ranks_are_rounded_down(source_of: SourceOf) -> None:
    plan = plan_of(source_of("llama"), allocation="effective-rank", rank_multiple=8)
    assert {site.rank % 8 for site in plan.sites} == {0}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_zero_matrices_get_the_least(source_of: SourceOf, tmp_path: Path, allocation: str) -> None:
    """No rule sees anything in them; before, their spectra gave NaN and the plan failed."""
    model = source_of("llama").load()
    with torch.no_grad():
        for role in ("q", "k"):
            model.get_submodule(f"model.layers.0.self_attn.{role}_proj").weight.zero_()  # type: ignore[operator]
    plain_model(model).save_pretrained(tmp_path / "zero")
    plan = plan_of(StoredModel(tmp_path / "zero", "zero"), allocation=allocation)
    ranks = {site.site: site.rank or 64 for site in plan.sites if len(site.members) > 1}
    least = min(ranks.values())
    noise_counts = allocation not in ("uniform", "gavish-donoho")
    assert not noise_counts or ranks["layers.0.qk"] == least < ranks["layers.1.qk"]
    assert all(rank >= 1 for rank in ranks.values())
