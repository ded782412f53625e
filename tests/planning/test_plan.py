"""Plans: the JSON round trip, and what is wrong in a file is said with its place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_recipes import made_recipe

from rk_export.errors import InputError
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.plan import Plan, SitePlan

SITE = SitePlan("layers.0.qk", 0, ("q", "k"), ("a.q", "a.k"), "joint", 24, QuantSpec(4, 32), reason="")
PLAN = Plan(
    "llama",
    "0123456789abcdef",
    made_recipe(groups=("qk",), rank=RankRule("energy", 0.93), table=None),
    (
        SITE,
        dataclasses.replace(SITE, site="layers.1.qk", layer=1, form="per_head", quant=None),
        SitePlan("layers.0.v", 0, ("v",), ("a.v",), "dense", 0, QuantSpec(2, 256, symmetric=False), "why"),
    ),
    table=QuantSpec(8, 32),
)


def test_the_json_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


@given(
    groups=st.none() | st.lists(st.sampled_from(["qk", "v", "gate_up", "down"]), unique=True).map(tuple),
    rank=st.builds(RankRule, st.sampled_from(["keep", "energy"]), st.floats(0.01, 0.99))
    | st.builds(RankRule, st.just("rank"), st.integers(1, 9999)),
    quant=st.none()
    | st.builds(QuantSpec, st.sampled_from([2, 4, 8]), st.sampled_from([16, 64]), st.booleans()),
    multiple=st.none() | st.integers(1, 256),
)
def test_recipes_survive_json(
    groups: tuple[str, ...] | None, rank: RankRule, quant: QuantSpec | None, multiple: int | None
) -> None:
    recipe = made_recipe(groups=groups, rank=rank, quant=quant, table=quant, rank_multiple=multiple)
    plan = dataclasses.replace(PLAN, recipe=recipe, table=quant)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_sites_of_a_layer() -> None:
    assert [site.site for site in PLAN.of_layer(0)] == ["layers.0.qk", "layers.0.v"]
    assert PLAN.of_layer(5) == ()


def test_an_edited_rank_is_read(tmp_path: Path) -> None:
    data = json.loads(json.dumps(PLAN.to_json()))
    data["sites"][0] |= {"rank": 8, "quant": {"bits": 8, "block_size": 64, "symmetric": False}}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert Plan.load(tmp_path / "plan.json").sites[0] == dataclasses.replace(
        SITE, rank=8, quant=QuantSpec(8, 64, symmetric=False)
    )


Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.pop("rk_export_plan"),
        lambda data: data.update(rk_export_plan=1),
        lambda data: data.pop("recipe"),
        lambda data: data.pop("structure"),
        lambda data: data["recipe"].update(speed=9),
        lambda data: data["recipe"]["steps"].append({"shrink": {}}),
        lambda data: data["recipe"]["steps"][1]["factorize"].update(energy="half"),
        lambda data: data["recipe"]["steps"][1].update(heal={"steps": 3}),
        lambda data: data["recipe"].update(steps=0.5),
        lambda data: data.pop("table"),
        lambda data: data.update(table={"bits": 5, "block_size": 32}),
        lambda data: data["sites"][0].pop("paths"),
        lambda data: data["sites"][0].update(colour="red"),
        lambda data: data["sites"][0].update(form="sparse"),
        lambda data: data["sites"][0].update(rank=0),
        lambda data: data["sites"][0].update(rank=-4),
        lambda data: data["sites"][0].update(rank="many"),
        lambda data: data["sites"][0].update(quant={"bits": 5, "block_size": 32}),
        lambda data: data["sites"][0].update(quant=4),
        lambda data: data.update(sites=3),
        lambda data: data["sites"][0].update(rank=7.5),
        lambda data: data["sites"][0].update(paths=["a.q"]),
    ],
)
def test_a_malformed_plan_is_an_input_error(edit: Edit) -> None:
    data = json.loads(json.dumps(PLAN.to_json()))
    edit(data)
    with pytest.raises(InputError) as caught:
        Plan.from_json(data, where="my.json")
    assert str(caught.value.where).startswith("my.json")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda data: data["sites"][1].update(rank="many"), "my.json: sites[1].rank"),
        (lambda data: data["sites"][2].update(rank=-4), "my.json: sites[2]: layers.0.v"),
        (
            lambda data: data["sites"][2]["quant"].update(block_size=24),
            "my.json: sites[2].quant: quantize.block",
        ),
        (
            lambda data: data["recipe"]["calibration"].update(tokens=9),
            "my.json: recipe.calibration: calibration.tokens",
        ),
        (lambda data: data["recipe"].update(groups=["moe"]), "my.json: recipe.groups"),
        (
            lambda data: data.update(shapes=[{"layer": 1, "ffn_width": 0}]),
            "my.json: shapes[0]: shapes: layer 1",
        ),
    ],
)
def test_what_does_not_fit_is_found_in_the_file(edit: Edit, place: str) -> None:
    data = json.loads(json.dumps(PLAN.to_json()))
    edit(data)
    with pytest.raises(InputError) as caught:
        Plan.from_json(data, where="my.json")
    assert caught.value.where == place


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "\ufeff{}"])
def test_a_file_that_is_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid JSON"):
        Plan.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Plan.load(tmp_path / "absent.json")
