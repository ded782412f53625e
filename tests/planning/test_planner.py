"""From options to plans: rank rules, break-even, groups that match nothing, and plans that fit no model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed import INT4, SourceOf, floats
from made_recipes import made_recipe
from tiny_models import FAMILIES

from rk_export.errors import InputError
from rk_export.model.sites import default_multiple
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.passes.numerics.ranks import kept_ratio
from rk_export.plan import SitePlan
from rk_export.planning.planner import check_plan, decide_plan

# Shapes of the tiny llama: hidden 64, q 64, k and v 32, gate and up 128.


def site_of(recipe: Recipe, source_of: SourceOf, name: str, family: str = "llama") -> SitePlan:
    plan = decide_plan(source_of(family), recipe)
    return next(site for site in plan.sites if site.site == name)


@pytest.mark.parametrize(
    ("keep", "multiple", "rank"), [(0.9, 1, 34), (0.9, 8, 32), (0.5, 1, 19), (0.5, 16, 16), (0.01, 16, 16)]
)
def test_the_keep_rule_takes_the_largest_rank_that_fits(
    source_of: SourceOf, keep: float, multiple: int, rank: int
) -> None:
    options = floats(("qk",), rank=RankRule("keep", keep), rank_multiple=multiple)
    site = site_of(options, source_of, "layers.1.qk")
    assert (site.form, site.rank, site.members) == ("joint", rank, ("q", "k"))
    assert site.paths == ("self_attn.q_proj", "self_attn.k_proj")
    if keep > 0.01:
        assert kept_ratio(site.rank, 64, 96) <= keep


def test_per_head_ranks_are_those_of_one_kv_group(source_of: SourceOf) -> None:
    options = floats(("qk",), qk="per-head", rank=RankRule("keep", 0.9), rank_multiple=1)
    site = site_of(options, source_of, "layers.0.qk")
    assert (site.form, site.rank) == ("per_head", int(0.9 * 64 * 48 / (64 + 48)))


def test_an_explicit_rank_is_taken_as_it_is(source_of: SourceOf) -> None:
    site = site_of(floats(("gate_up",), rank=RankRule("rank", 37)), source_of, "layers.0.gate_up")
    assert (site.form, site.rank, site.reason) == ("joint", 37, "")


@pytest.mark.parametrize(
    ("groups", "qk", "largest"), [(("qk",), "whole", 64), (("qk",), "per-head", 48), (("k",), "whole", 32)]
)
def test_a_rank_beyond_full_is_refused(
    source_of: SourceOf, groups: tuple[str, ...], qk: Any, largest: int
) -> None:
    decide_plan(source_of("llama"), floats(groups, qk=qk, rank=RankRule("rank", largest)))
    with pytest.raises(InputError, match=f"rank {largest + 1} exceeds {largest}") as caught:
        decide_plan(source_of("llama"), floats(groups, qk=qk, rank=RankRule("rank", largest + 1)))
    assert caught.value.where == "factorize.rank"


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9])
def test_the_energy_rule_reads_the_spectrum(source_of: SourceOf, energy: float) -> None:
    source = source_of("llama")
    options = floats(("qk",), rank=RankRule("energy", energy), rank_multiple=1)
    model = source.load()
    for index in range(source.layer_count):
        attention: Any = model.get_submodule(f"model.layers.{index}.self_attn")
        stacked = torch.cat([attention.q_proj.weight, attention.k_proj.weight]).double()
        share = torch.linalg.svdvals(stacked).square().cumsum(0)
        expected = int((share < energy * share[-1]).sum()) + 1
        site = site_of(options, source_of, f"layers.{index}.qk")
        if expected > 64 * 96 // (64 + 96):
            assert site.form == "dense"
            assert "break-even" in site.reason
        else:
            assert (site.form, site.rank) == ("joint", expected)


def test_the_energy_rule_per_head_serves_every_group(source_of: SourceOf) -> None:
    source = source_of("llama")
    options = floats(("qk",), qk="per-head", rank=RankRule("energy", 0.6), rank_multiple=1)
    attention: Any = source.load().get_submodule("model.layers.0.self_attn")
    ranks = []
    for group in range(2):
        rows = (
            attention.q_proj.weight[32 * group : 32 * group + 32],
            attention.k_proj.weight[16 * group : 16 * group + 16],
        )
        share = torch.linalg.svdvals(torch.cat(rows).double()).square().cumsum(0)
        ranks.append(int((share < 0.6 * share[-1]).sum()) + 1)
    assert site_of(options, source_of, "layers.0.qk").rank == max(ranks)


def test_beyond_break_even_a_site_stays_dense_and_says_why(source_of: SourceOf) -> None:
    options = floats(("qk",), rank=RankRule("energy", 0.999), rank_multiple=1, quant=INT4)
    site = site_of(options, source_of, "layers.0.qk")
    assert (site.form, site.rank, site.quant) == ("dense", 0, INT4)
    assert "break-even is rank 38" in site.reason
    assert "(96, 64)" in site.reason


def test_small_keeps_with_coarse_steps_stay_dense(source_of: SourceOf) -> None:
    """One step of the rounding costs more than the dense matrix."""
    site = site_of(floats(("k",), rank=RankRule("keep", 0.5), rank_multiple=32), source_of, "layers.0.k")
    assert (site.form, site.rank) == ("dense", 0)
    assert "rank 32" in site.reason


@pytest.mark.parametrize(
    ("columns", "rows", "quant", "multiple"),
    [
        (4096, 8192, QuantSpec(4, 32), 64),
        (4096, 8192, QuantSpec(4, 128), 128),
        (4096, 8192, None, 64),
        (576, 768, QuantSpec(4, 32), 32),
        (576, 768, QuantSpec(4, 128), 128),
        (576, 768, None, 8),
        (64, 96, QuantSpec(4, 32), 8),
    ],
)
def test_rounding_suits_size_and_block(
    columns: int, rows: int, quant: QuantSpec | None, multiple: int
) -> None:
    assert default_multiple(columns, rows, quant) == multiple


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_exactly_one_site(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    plan = decide_plan(source, made_recipe(rank=RankRule("keep", 0.95)))
    assert (plan.model_type, plan.structure) == (source.config.model_type, source.structure())
    for index in range(source.layer_count):
        planned = [path for site in plan.of_layer(index) for path in site.paths]
        projections = source.architecture.projections(source.config, index)
        assert sorted(planned) == sorted(projection.path for projection in projections)
    assert {site.quant for site in plan.sites} == {QuantSpec(4, 32)}
    assert plan.recipe.groups is not None
    assert plan.recipe.groups[0] == "qk"
    check_plan(source, plan)


@pytest.mark.parametrize(
    ("family", "group"), [("gpt2", "gate_up"), ("mixtral", "gate_up"), ("bert", "gate_up")]
)
def test_a_group_that_matches_nothing_is_refused(source_of: SourceOf, family: str, group: str) -> None:
    with pytest.raises(InputError, match=f"'{group}' matches nothing") as caught:
        decide_plan(source_of(family), floats((group,)))
    assert caught.value.where == "factorize.groups"
    assert "qk" in (caught.value.fix or "")
    assert group not in (caught.value.fix or "").replace(",", "").split()


def test_a_plan_of_another_model_is_refused(source_of: SourceOf) -> None:
    plan = decide_plan(source_of("llama"), floats(("qk",)))
    check_plan(source_of("llama"), plan)
    for other in (source_of("qwen2"), source_of("llama", num_hidden_layers=1)):
        with pytest.raises(InputError, match="made for another model"):
            check_plan(other, plan)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rank": 65}, "exceeds the full rank 64"),
        ({"paths": ("self_attn.q_proj", "self_attn.z_proj")}, "no such matrix"),
        ({"paths": ("self_attn.q_proj", "self_attn")}, "no such matrix"),
        ({"form": "per_head", "rank": 49}, "exceeds the full rank 48"),
    ],
)
def test_an_edit_that_fits_no_matrix_is_refused(
    source_of: SourceOf, change: dict[str, Any], what: str
) -> None:
    source = source_of("llama")
    plan = decide_plan(source, floats(("qk",), rank=RankRule("rank", 8)))
    sites = tuple(replace(site, **change) if site.site == "layers.1.qk" else site for site in plan.sites)
    with pytest.raises(InputError, match=what) as caught:
        check_plan(source, replace(plan, sites=sites))
    assert caught.value.where == "layers.1.qk"


@pytest.mark.parametrize("edit", ["dropped", "twice", "other layer"])
def test_an_edit_that_loses_or_doubles_a_matrix_is_refused(source_of: SourceOf, edit: str) -> None:
    source = source_of("llama")
    plan = decide_plan(source, floats(("qk",), rank=RankRule("rank", 8)))
    sites = {
        "dropped": plan.sites[1:],
        "twice": (*plan.sites, plan.sites[0]),
        "other layer": (replace(plan.sites[0], layer=7), *plan.sites[1:]),
    }[edit]
    with pytest.raises(InputError):
        check_plan(source, replace(plan, sites=sites))
