"""Recipes from the command line: presets, files, single fields, amounts, and what every mistake is answered with."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Ended
from made_recipes import INT4

from rk_export.cli.compress_arguments import add_recipe_arguments, asked_recipe
from rk_export.errors import InputError
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import HealOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.options.prepare import Prepare
from rk_export.options.quantize import Quantize
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.texts import TextFile
from rk_export.recipes import load, preset_names

STEPS_OF_ITS_OWN = [name for name in preset_names() if not name.startswith("basel")]


def asked(*words: object) -> Recipe | None:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return asked_recipe(parser.parse_args([str(word) for word in words]))


def recipe_of(*words: object) -> Recipe:
    found = asked(*words)
    assert found is not None
    return found


def settings(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--set", text)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.txt"
    path.write_text(" ".join(f"{number} plus 1 is {number + 1}." for number in range(300)))
    return path


# --- presets and settings


def test_nothing_said_is_no_recipe() -> None:
    assert asked() is None
    assert recipe_of("--ep", "cpu") == load("default")


@pytest.mark.parametrize("name", STEPS_OF_ITS_OWN)
def test_a_preset_is_what_its_file_says(name: str) -> None:
    assert recipe_of("--recipe", name) == load(name)


def test_the_target_is_said_apart() -> None:
    assert recipe_of("--recipe", "int4", "--ep", "portable").target.ep == "portable"
    with pytest.raises(InputError, match="int8 inputs have no kernels"):
        asked("--recipe", "w8a8", "--ep", "portable")


@pytest.mark.parametrize("name", ["joint-rank", "basel", "cap", "sslc", "wanda", "mixtures", "floats"])
def test_presets_of_methods_keep_floats_and_change_no_weights_before(name: str, task: Path) -> None:
    own = settings(f"basel.target={task}") if name == "basel" else ()
    found = recipe_of("--recipe", name, *own)
    assert (found.quant, found.table_quant, found.preparations) == (None, None, ())


def test_joint_rank_is_the_papers() -> None:
    found = recipe_of("--recipe", "joint-rank", "--keep", 0.9)
    assert (found.rank, found.budget) == (RankRule("keep", 0.9), None)
    assert (found.groups, found.calibration.metric, found.factorize.form) == (
        ("qk", "gate_up"),
        "none",
        None,
    )
    ranks = recipe_of("--recipe", "joint-rank", *settings("factorize.keep=null", "factorize.rank=64"))
    assert ranks.rank == RankRule("rank", 64)


def test_settings_win_over_the_preset() -> None:
    words = settings("factorize.groups=[qkv]", "calibration.text=self", "quantize.bits=8")
    found = recipe_of("--recipe", "joint-rank", "--keep", 0.9, *words)
    assert (found.groups, found.calibration.metric) == (("qkv",), "self")
    assert found.quant is not None
    assert found.quant.bits == 8


def test_settings_reach_their_step(task: Path) -> None:
    words = settings(
        f"basel.target={task}", "basel.keep=null", "basel.energy=0.6", "basel.steps=7", "basel.seed=3"
    )
    (basel,) = recipe_of("--recipe", "basel", *words).methods
    assert basel == BaselOptions(TextFile.of(task), energy=0.6, steps=7, seed=3)
    (cap,) = recipe_of("--recipe", "mixtures", "--size", "90MB", *settings("cap.steps=9")).methods
    assert cap == CapOptions(size=90e6, selector="auction", steps=9)


def test_a_missing_step_is_added_where_it_belongs() -> None:
    words = settings("prune.blocks=2", "prune.ffn_keep=0.8", "prune.kv_heads_keep=1")
    pruning = PruneOptions(blocks=2, ffn_keep=0.8, kv_heads_keep=1)
    assert recipe_of(*words).methods == (pruning,)
    found = recipe_of("--recipe", "cap", *words, *settings("heal.steps=3"))
    assert found.methods == (pruning, *load("cap").methods, HealOptions(steps=3))
    names = [step.name for step in recipe_of("--recipe", "int4", *settings("correct.rank=4")).steps]
    assert names == ["prepare", "quantize", "quantize", "correct"]


def test_a_step_that_stands_twice_is_counted_from_0() -> None:
    steps = [
        step
        for step in recipe_of("--recipe", "int4", *settings("quantize[1].bits=4", "quantize.block=64")).steps
        if isinstance(step, Quantize)
    ]
    assert [(step.bits, step.block) for step in steps] == [(4, 64), (4, 32)]


def test_a_bare_value_stands_for_the_one_field() -> None:
    assert recipe_of("--recipe", "int4", *settings("prepare=[fold, rotate]")).preparations == (
        "fold",
        "rotate",
    )
    assert recipe_of("--recipe", "int4", *settings("prepare=[]")).find(Prepare) == Prepare(())


# --- how much stays


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (("--size", "90MB"), Budget("size", 90e6)),
        (("--keep", 0.9), Budget("keep", 0.9)),
        (("--mean-bits", 4.5), Budget("mean_bits", 4.5)),
        (("--speed-up", 1.8), Budget("speed_up", 1.8)),
        (("--speed-up", 1.8, "--set", "budget.phase=prefill"), Budget("speed_up", 1.8, "prefill")),
        (("--set", "budget.mean_bits=5"), Budget("mean_bits", 5.0)),
        ((), Budget("size", "int4")),
    ],
)
def test_an_amount_is_the_budget_of_the_default(words: tuple[object, ...], budget: Budget) -> None:
    assert recipe_of("--recipe", "default", *words) == replace(load("default"), budget=budget)


def test_an_amount_goes_to_the_step_that_says_how_much_stays() -> None:
    found = recipe_of("--recipe", "cap", "--keep", 0.3)
    assert found.budget is None
    assert found.limit == Budget("keep", 0.3)
    found = recipe_of("--recipe", "sslc", "--size", "50MB")
    assert (found.budget, found.limit) == (None, Budget("size", 50e6))


def test_a_recipe_that_leaves_nothing_open_may_factorize_under_an_amount() -> None:
    found = recipe_of("--recipe", "int4", "--size", "90MB")
    assert [step.name for step in found.steps] == ["prepare", "factorize", "quantize", "quantize"]
    assert (found.budget, found.quant) == (Budget("size", 90e6), INT4)


def test_an_amount_decides_over_groups_that_are_set_beside_it() -> None:
    words = settings("factorize.groups=[qk]", "factorize.rank_multiple=8")
    found = recipe_of("--recipe", "floats", "--keep", 0.8, *words)
    assert (found.groups, found.rank, found.budget) == (("qk",), None, Budget("keep", 0.8))
    found = recipe_of("--size", "90MB", *words)
    assert (found.groups, found.budget) == (("qk",), Budget("size", 90e6))
    found = recipe_of("--recipe", "joint-rank", "--keep", 0.8, *words)
    assert (found.rank, found.budget) == (RankRule("keep", 0.8), None)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("--recipe", "cap", "--mean-bits", 4), "--mean-bits"),
        (("--recipe", "sslc", "--speed-up", 2), "--speed-up"),
        (("--recipe", "joint-rank", "--size", "90MB"), "--size"),
        (("--size", "90MB", "--set", "budget.size=80MB"), "--size"),
        (("--size", "90MB", "--set", "budget.phase=prefill"), "budget.phase"),
        (("--size", "much"), "--size"),
        (("--keep", 1.5), "--keep"),
        (("--mean-bits", 1), "--mean-bits"),
        (("--speed-up", 1), "--speed-up"),
    ],
)
def test_an_amount_that_does_not_go_is_refused(words: tuple[object, ...], where: str) -> None:
    with pytest.raises(InputError) as caught:
        asked(*words)
    assert (caught.value.where, bool(caught.value.fix)) == (where, True)


def test_two_amounts_are_refused(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ended = cli("compress", llama, "-o", tmp_path / "out", "--size", "90MB", "--keep", 0.5)
    assert (ended.code, "not allowed with argument" in ended.err) == (2, True)


# --- mistakes


@pytest.mark.parametrize(
    ("setting", "place", "fix"),
    [
        ("quantise.bits=4", "", "did you mean quantize?"),
        ("quantize.bit=8", ": quantize.bit", "did you mean bits?"),
        ("quantize.bits=four", ": quantize.bits", ""),
        ("quantize.bits=3", ": quantize.bits", "choose 2, 4 or 8"),
        ("quantize.bits", "", "STEP.FIELD=VALUE"),
        ("quantize[2].bits=4", "", "count from 0"),
        ("prepare=none", ": prepare", ""),
        ("factorize.rank=64", ": factorize", "give one of them"),
        ("calibration.text=absent.txt", ": calibration.text", ""),
        ("target.ep=tpu", ": target.ep", ""),
    ],
)
def test_a_setting_that_does_not_go_is_named(setting: str, place: str, fix: str) -> None:
    name = "joint-rank" if setting.startswith("factorize") else "int4"
    with pytest.raises(InputError) as caught:
        asked("--recipe", name, "--set", setting)
    assert caught.value.where == f"--set {setting}{place}"
    assert fix in str(caught.value.fix)


def test_a_field_that_is_set_twice_is_refused() -> None:
    with pytest.raises(InputError, match="is given twice"):
        asked("--recipe", "int4", *settings("quantize.bits=8", "quantize.bits=4"))


@pytest.mark.parametrize(
    ("text", "place", "fix"),
    [
        ("steps:\n  - cap: {kep: 0.5}\n", "2:11: cap.kep: ", "did you mean keep?"),
        ("steps:\n  - capp: {keep: 0.5}\n", "2:5: capp: ", "did you mean cap?"),
        ("steps:\n  - cap: {keep: half}\n", "2:11: cap.keep: ", ""),
        ("steps:\n  - quantize: {}\n  - cap: {keep: 0.5}\n", "3:5: cap: ", "exchange the two"),
        ("budget: {size: 9MB, keep: 0.5}\nsteps: []\n", "1:1: budget: ", "give one of"),
        ("steps:\n  - cap: {keep: 0.5\n", "3:1: ", "correct the file"),
    ],
    ids=["field", "step", "type", "order", "budgets", "YAML"],
)
def test_a_mistake_in_a_file_is_shown_with_line_and_column(
    cli: Cli, llama: Path, tmp_path: Path, text: str, place: str, fix: str
) -> None:
    """All kinds of mistakes are in the tests of recipes."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    ended = cli("compress", llama, "-o", tmp_path / "out", "--recipe", path)
    assert ended.code == 2
    assert f"rk-export: error: {path}:{place}" in ended.err
    assert fix in ended.err


def test_a_target_that_matches_nothing_is_refused(cli: Cli, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps:\n  - quantize: {targets: [qq], bits: 8}\n")
    ended = cli("compress", llama, "-o", tmp_path / "out", "--recipe", path)
    assert ended.code == 2
    assert "'qq' matches no matrix of llama" in ended.err
    assert "did you mean q?" in ended.err


def test_a_target_that_matches_nothing_is_no_question_of_size(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ended = cli("compress", llama, "-o", tmp_path / "out", *settings("quantize.targets=[layers.9.*]"))
    assert (ended.code, "'layers.9.*' matches no matrix of llama" in ended.err) == (2, True)


@pytest.mark.parametrize(("amount", "said"), [(("--keep", 0.8), True), (("--mean-bits", 5), False)])
def test_open_formats_that_no_budget_chooses_are_said(
    cli: Cli, llama: Path, tmp_path: Path, amount: tuple[object, ...], said: bool
) -> None:
    out = tmp_path / "out"
    ended = cli(
        "compress", llama, "-o", out, *amount, *settings("calibration.tokens=512"), "--dry-run", "--json"
    )
    assert ended.code == 0, ended.err
    assert any("bits: auto is 4 bits" in one for one in json.loads(ended.out)["notices"]) is said


def test_an_unknown_recipe_names_the_nearest(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ended = cli("compress", llama, "-o", tmp_path / "out", "--recipe", "int5")
    assert ended.code == 2
    assert "int5: neither a preset nor a file" in ended.err
    assert "did you mean int" in ended.err


# --- the command `recipes`


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


def test_recipes_are_listed_with_what_they_are_for(cli: Cli) -> None:
    text = done(cli("recipes")).out
    assert all(f"{name} " in text for name in preset_names())
    listed: dict[str, Any] = json.loads(done(cli("recipes", "--json")).out)
    assert tuple(listed) == preset_names()
    assert listed["cap"]["paper"] == "2505.03801"


@pytest.mark.parametrize("name", STEPS_OF_ITS_OWN)
def test_a_printed_recipe_is_a_file_of_it(cli: Cli, tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(done(cli("recipes", name)).out)
    assert load(path) == load(name)


def test_every_field_is_explained(cli: Cli) -> None:
    text = done(cli("recipes", "--steps")).out
    assert {"kv_heads_keep", "learning_rate", "ignore", "mean_bits", "context_length"} <= set(text.split())
    schema = json.loads(done(cli("recipes", "--schema")).out)
    assert {"steps", "calibration", "budget", "target", "about"} == set(schema["properties"])


def test_recipes_refuses_what_it_does_not_know(cli: Cli) -> None:
    ended = cli("recipes", "capp")
    assert (ended.code, "did you mean cap?" in ended.err) == (2, True)
    assert cli("recipes", "cap", "--schema").code == 2


# --- from a recipe to a bundle


EIGHT_BITS = ("--set", "quantize.targets=all", "--set", "quantize.bits=8")


@pytest.mark.whole
def test_a_plan_of_sparse_parts_is_applied_and_guarded(cli: Cli, llama: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    search = ("--recipe", "cap", "--keep", 0.6, *settings("cap.steps=2", "calibration.tokens=512"))
    done(cli("plan", llama, "-o", plan, *search))
    done(cli("compress", llama, "-o", tmp_path / "out", "--plan", plan))
    assert (tmp_path / "out" / "plan.json").read_bytes() == plan.read_bytes()
    data = json.loads(plan.read_text())
    data["sites"][0]["entries"] += 1
    plan.write_text(json.dumps(data))
    refused = cli("compress", llama, "-o", tmp_path / "other", "--plan", plan)
    assert refused.code == 2
    assert "the search chose" in refused.err


def test_dry_runs_of_a_plan_say_what_would_go(cli: Cli, llama: Path, tmp_path: Path) -> None:
    words = settings("prune.ffn_keep=0.75", "prune.blocks=1", "calibration.tokens=512")
    plan = tmp_path / "plan.json"
    done(cli("plan", llama, "-o", plan, "--recipe", "floats", *words))
    text = done(cli("compress", llama, "-o", tmp_path / "none", "--plan", plan, "--dry-run")).out
    assert "pruned.block_" in text
    assert "ffn_width" in text
    assert not (tmp_path / "none").exists()


@pytest.mark.whole
@pytest.mark.parametrize(("size", "extra"), [(480_000, ()), (340_000, EIGHT_BITS)])
@pytest.mark.parametrize("selector", ["policy", "pools", "auction", "wanda", "magnitude"])
def test_a_size_is_met_by_the_files(
    cli: Cli, llama: Path, tmp_path: Path, selector: str, size: int, extra: tuple[object, ...]
) -> None:
    """Beside the matrices stand the embedding, the rotary tables and the graph, which is estimated."""
    out = tmp_path / "out"
    search = settings(f"cap.selector={selector}", "cap.steps=2", "calibration.tokens=512")
    done(cli("compress", llama, "-o", out, "--recipe", "cap", "--size", size, *search, *extra))
    found = sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert 0.5 * size < found <= size
