"""`--set`: single fields, added steps, whole sections, and settings that are none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rk_export.errors import InputError
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import HealOptions
from rk_export.options.factorize import Factorize
from rk_export.options.prepare import Prepare
from rk_export.options.quantize import Quantize
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.recipes import load


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.steps]


def quantize(recipe: Recipe) -> list[Quantize]:
    return [step for step in recipe.steps if isinstance(step, Quantize)]


@pytest.mark.parametrize(
    ("preset", "setting", "field", "value"),
    [
        ("cap", "cap.keep=0.4", "keep", 0.4),
        ("cap", "cap.keep=1e-1", "keep", 0.1),
        ("cap", "cap.selector=wanda", "selector", "wanda"),
        ("joint-rank", "factorize.groups=[q, k]", "groups", ("q", "k")),
        ("joint-rank", "factorize.groups=qkv", "groups", ("qkv",)),
        ("joint-rank", "factorize.groups=null", "groups", None),
        ("pruned", "prune.kv_heads_keep=1", "kv_heads_keep", 1),
        ("int4", "quantize.with=rtn", "quantizer", "rtn"),
        ("int4", "quantize.symmetric=false", "symmetric", False),
        ("int4", "prepare.names=[fold]", "names", ("fold",)),
        ("int4", "prepare=[fold, rotate]", "names", ("fold", "rotate")),
        ("int4", "prepare=[]", "names", ()),
        ("int4", "prepare={names: [scale]}", "names", ("scale",)),
    ],
)
def test_a_field_of_a_step(preset: str, setting: str, field: str, value: object) -> None:
    recipe, before = load(preset, [setting]), load(preset)
    (changed,) = [new for new, old in zip(recipe.steps, before.steps, strict=True) if new != old]
    assert getattr(changed, field) == value
    assert (recipe.calibration, recipe.budget, recipe.target) == (
        *(before.calibration, before.budget, before.target),
    )


@pytest.mark.parametrize(
    ("preset", "setting", "expected"),
    [
        ("int4", "heal.steps=5", ["prepare", "quantize", "quantize", "heal"]),
        ("int4", "heal={steps: 5}", ["prepare", "quantize", "quantize", "heal"]),
        ("int4", "correct.rank=4", ["prepare", "quantize", "quantize", "correct"]),
        ("int4", "prune.blocks=1", ["prune", "prepare", "quantize", "quantize"]),
        ("int4", "factorize.keep=0.9", ["prepare", "factorize", "quantize", "quantize"]),
        ("int4", "cap.keep=0.5", ["prepare", "cap", "quantize", "quantize"]),
        ("cap", "quantize.bits=8", ["cap", "quantize"]),
        ("pruned", "correct.rank=4", ["prune", "prepare", "quantize", "quantize", "correct", "heal"]),
    ],
)
def test_a_missing_step_is_added_where_it_belongs(
    preset: str, setting: str, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rk_export"):
        recipe = load(preset, [setting])
    assert names(recipe) == expected
    name = setting.partition("=")[0].partition(".")[0]
    assert f"--set {setting}: adds the step {name}" in caplog.messages


@pytest.mark.parametrize("order", [1, -1])
def test_steps_may_be_added_in_any_order(order: int) -> None:
    settings = ["heal.steps=3", "correct.rank=4", "prune.blocks=1", "heal.seed=2", "prune.ffn_keep=0.9"]
    recipe = load("int4", settings[::order])
    assert names(recipe) == ["prune", "prepare", "quantize", "quantize", "correct", "heal"]
    assert recipe.find(HealOptions) == HealOptions(3, seed=2)
    assert recipe == load("int4", settings)


def test_a_number_says_which_step(caplog: pytest.LogCaptureFixture) -> None:
    first, second = quantize(load("int4", ["quantize[0].bits=8", "quantize[1].bits=4"]))
    assert (first.bits, second.bits) == (8, 4)
    with caplog.at_level(logging.INFO, "rk_export"):
        first, second = quantize(load("int4", ["quantize.bits=2"]))
    assert (first.bits, second.bits) == (2, 8)
    assert "the first of 2 steps quantize; quantize[1] is the next" in caplog.text


def test_numbers_mean_the_same_after_a_step_was_added() -> None:
    settings = ["quantize[1].bits=4", "prune.blocks=1", "quantize[0].bits=8"]
    first, second = quantize(load("int4", settings))
    assert (first.bits, second.bits) == (8, 4)


@pytest.mark.parametrize(
    ("preset", "settings", "budget"),
    [
        ("default", ["budget.size=90MB"], Budget("size", 90e6)),
        ("default", ["budget={keep: 0.9}"], Budget("keep", 0.9)),
        ("default", ["budget.mean_bits=4.5"], Budget("mean_bits", 4.5)),
        ("default", ["budget.speed_up=1.5"], Budget("speed_up", 1.5)),
        ("default", ["budget.speed_up=1.5", "budget.phase=prefill"], Budget("speed_up", 1.5, "prefill")),
        ("default", ["budget.phase=prefill", "budget.speed_up=1.5"], Budget("speed_up", 1.5, "prefill")),
        ("floats", ["budget.keep=0.9"], Budget("keep", 0.9)),
    ],
)
def test_a_budget_takes_the_place_of_another(preset: str, settings: list[str], budget: Budget) -> None:
    recipe = load(preset, settings)
    assert recipe.budget == budget
    assert recipe.steps == load(preset).steps


def test_a_budget_goes_and_the_steps_stay() -> None:
    recipe, before = load("default", ["budget=null"]), load("default")
    assert before.budget is not None
    assert recipe.budget is None
    assert recipe.steps == before.steps


def test_sections() -> None:
    settings = ["calibration.text=none", "calibration.seed=3", "target.ep=cuda", "target.context_length=128"]
    recipe = load("int4", settings)
    assert (recipe.calibration.text, recipe.calibration.seed) == ("none", 3)
    assert (recipe.target.ep, recipe.target.context_length) == ("cuda", 128)
    assert load("int4", ["target={ep: cuda}"]).target.ep == "cuda"


def test_a_text_file(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("some text", encoding="utf-8")
    corpus = load("int4", [f"calibration.text={text}"]).calibration.corpus
    assert corpus is not None
    assert (corpus.name, corpus.path) == ("own.txt", text)


def test_null_takes_a_field_away() -> None:
    recipe = load("joint-rank", ["factorize.keep=null", "factorize.rank=8"])
    assert recipe.find(Factorize) == Factorize(("qk", "gate_up"), rank=8)
    assert load("cap", ["cap.keep=null", "cap.size=90MB"]).find(CapOptions) == CapOptions(
        size=90e6, selector="policy", steps=100
    )
    assert load("int4", ["prepare=null"]).find(Prepare) == Prepare()


def test_a_whole_step_at_once() -> None:
    first, second = quantize(load("int4", ["quantize={bits: 8, with: rtn}"]))
    assert first == Quantize(bits=8, quantizer="rtn")
    assert second == quantize(load("int4"))[1]
    recipe = load("int4", ["heal={steps: 5}", "heal.seed=3"])
    assert recipe.find(HealOptions) == HealOptions(5, seed=3)


def test_a_bare_list_becomes_fields(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps:\n  - prepare: [fold]\n", encoding="utf-8")
    assert load(path, ["prepare.names=[scale]"]).steps == (Prepare(("scale",)),)


@pytest.mark.parametrize(
    ("settings", "where", "what", "hint"),
    [
        (["heal.steps"], "heal.steps", "no setting", "STEP.FIELD=VALUE"),
        (["=5"], "=5", "no setting", "STEP.FIELD=VALUE"),
        (["heal.steps.x=5"], "heal.steps.x=5", "no setting", "STEP.FIELD=VALUE"),
        (["quantize[x].bits=4"], "quantize[x].bits=4", "no setting", "STEP.FIELD=VALUE"),
        (["heel.steps=5"], "heel.steps=5", "there is no step 'heel'", "did you mean heal?"),
        (
            ["calibrate.seed=5"],
            "calibrate.seed=5",
            "there is no step 'calibrate'",
            "did you mean calibration?",
        ),
        (["steps=[]"], "steps=[]", "there is no step 'steps'", "known: prune"),
        (["about.does=x"], "about.does=x", "there is no step 'about'", "known: prune"),
        (["heal.stepz=5"], "heal.stepz=5: heal.stepz", "there is no such field", "did you mean steps?"),
        (["target.eps=cpu"], "target.eps=cpu: target.eps", "there is no such field", "did you mean ep?"),
        (["budget.siez=9MB"], "budget.siez=9MB: budget.siez", "there is no such field", "did you mean size?"),
        (
            ["quantize.quantizer=rtn"],
            "quantize.quantizer=rtn: quantize.quantizer",
            "no such field",
            "write with",
        ),
        (["heal.steps=many"], "heal.steps=many: heal.steps", "found 'many'", "--steps"),
        (["heal.steps=0"], "heal.steps=0: heal.steps", "0 is too few", "at least 1"),
        (["heal.steps="], "heal.steps=: heal.steps", "found None", "--steps"),
        (["heal=null"], "heal=null: heal.steps", "the field is missing", "--steps"),
        (["heal.seed=3"], "heal.seed=3: heal.steps", "the field is missing", "--steps"),
        (["prepare.names=[rotat]"], "prepare.names=[rotat]: prepare", "unknown preparation 'rotat'", "fold"),
        (["heal.steps=[1"], "heal.steps=[1", "no YAML", "correct the value"),
        (["heal.steps=a: b: c"], "heal.steps=a: b: c", "no YAML", "correct the value"),
        (["heal.steps=!!int a"], "heal.steps=!!int a", "neither text nor a number", "correct the value"),
        (["quantize[2].bits=4"], "quantize[2].bits=4", "the recipe has 2 steps quantize", "count from 0"),
        (["heal[0].steps=4"], "heal[0].steps=4", "the recipe has 0 steps heal", "count from 0"),
        (["quantize.bits=8", "quantize[0].bits=4"], "quantize[0].bits=4", "is given twice", "drop one"),
        (["heal.steps=5", "heal={steps: 6}"], "heal={steps: 6}", "is given twice", "drop one"),
        (
            ["budget.size=9MB", "budget.keep=0.5"],
            "budget.keep=0.5",
            "budget.size=9MB is a budget already",
            "drop one",
        ),
        (["calibration=5"], "calibration=5: calibration", "expected an object; found 5", "--steps"),
        (
            ["calibration.text=" + "a" * 5000],
            "calibration.text=" + "a" * 5000 + ": calibration.text",
            "no such file",
            "",
        ),
    ],
)
def test_a_setting_that_is_none(settings: list[str], where: str, what: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load("int4", settings)
    assert caught.value.where == f"--set {where}"
    assert what in caught.value.what
    assert hint in str(caught.value.fix)


@pytest.mark.parametrize(
    ("preset", "setting", "where", "what"),
    [
        ("cap", "sslc.keep=0.5", "--set sslc.keep=0.5: sslc", "cap decides already"),
        ("cap", "cap.size=90MB", "--set cap.size=90MB: cap", "keep and size both"),
        ("cap", "budget.keep=0.5", "--set budget.keep=0.5: budget", "the step cap says how much stays"),
        ("joint-rank", "factorize.rank=8", "--set factorize.rank=8: factorize", "keep and rank both"),
        (
            "joint-rank",
            "factorize.keep=null",
            "joint-rank.yaml:7:17: factorize.groups",
            "nothing says how much",
        ),
        ("w8a8", "target.ep=cuda", "w8a8.yaml:6:42: quantize.activations", "no kernels in a graph for cuda"),
        ("basel", "basel.steps=5", "basel.yaml:7:5: basel.target", "the field is missing"),
    ],
)
def test_a_setting_that_does_not_go_with_the_recipe(preset: str, setting: str, where: str, what: str) -> None:
    """The setting is named where it brought the error, else the line of the recipe."""
    with pytest.raises(InputError) as caught:
        load(preset, [setting])
    assert what in caught.value.what
    assert caught.value.where == where


def test_an_added_step_moves_no_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps:\n  - prepare: auto\n  - quantize: {bits: 3}\n", encoding="utf-8")
    for settings in ([], ["prune.blocks=1"], ["heal.steps=5", "prune.blocks=1"]):
        with pytest.raises(InputError) as caught:
            load(path, settings)
        assert caught.value.where == f"{path}:3:16: quantize.bits"


def test_steps_that_are_no_list_are_the_file_s_mistake(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps:\n  quantize: {bits: 4}\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(path, ["heal.steps=5"])
    assert caught.value.where == f"{path}:1:1: steps"
