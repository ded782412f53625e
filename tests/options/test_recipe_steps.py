"""Which steps go together and in which order, and recipes with one step or another amount changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rk_export.errors import InputError
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import HealOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.sslc.options import SslcOptions
from rk_export.options.calibration import UNWEIGHED, CalibrationOptions
from rk_export.options.correct import Correct
from rk_export.options.factorize import Factorize
from rk_export.options.prepare import Prepare
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.quantize import TABLES, Quantize
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.options.step import Step
from rk_export.options.target import Target
from rk_export.options.texts import TextFile

TASK = TextFile("task.txt", "0" * 64)
PRUNE, PREPARE, OPEN, HEAL = PruneOptions(blocks=1), Prepare(), Factorize(), HealOptions(steps=2)
INT4, TABLE, AUTO, CARRY = (
    Quantize(),
    Quantize(TABLES, bits=8),
    Quantize(bits="auto"),
    Quantize(quantizer="carry"),
)
CAP, SSLC, BASEL = CapOptions(keep=0.5), SslcOptions(keep=0.5), BaselOptions(TASK, keep=0.5)
SHARE, SIZE = Budget("keep", 0.9), Budget("size", 9e7)

# --- order


@pytest.mark.parametrize(
    "steps",
    [
        (PRUNE, PREPARE, OPEN, INT4, TABLE, Correct(4), HEAL),
        (PREPARE, PRUNE, INT4),
        (CAP, INT4, TABLE, HEAL),
        (PRUNE, BASEL, HEAL),
        (),
    ],
)
def test_steps_in_the_order_of_their_stages(steps: tuple[Step, ...]) -> None:
    if OPEN in steps:
        steps = tuple(step for step in steps if not isinstance(step, Correct))
    assert Recipe(steps).steps == steps


@pytest.mark.parametrize(
    ("steps", "where", "what"),
    [
        ((INT4, PREPARE), "prepare", "it stands after quantize"),
        ((HEAL, INT4), "quantize", "it stands after heal"),
        ((Correct(4), INT4), "quantize", "it stands after correct"),
        ((INT4, CAP), "cap", "it stands after quantize"),
        ((OPEN, PRUNE), "prune", "it stands after factorize"),
        ((PREPARE, INT4, HEAL, PREPARE), "prepare", "it stands after heal"),
        ((PREPARE, PREPARE), "prepare", "the step stands twice"),
        ((PREPARE, PRUNE, PREPARE), "prepare", "the step stands twice"),
        ((HEAL, HEAL), "heal", "the step stands twice"),
        ((CAP, CAP), "cap", "the step stands twice"),
        ((CAP, SSLC), "sslc", "cap decides already what stays"),
        ((Factorize(keep=0.9), BASEL), "basel", "factorize decides already what stays"),
    ],
)
def test_an_order_that_makes_no_sense(steps: tuple[Step, ...], where: str, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        Recipe(steps)
    assert caught.value.where == where
    assert caught.value.fix


# --- what goes together


@pytest.mark.parametrize(
    ("build", "where", "what"),
    [
        (lambda: Recipe((Quantize(quantizer="rtn"), Quantize(TABLES, quantizer="gptq"))), "quantize.with", "same"),
        (lambda: Recipe((Quantize(("all",), bits=8, activations=8),)), "quantize.activations", "embed_tokens has no"),
        (lambda: Recipe((Quantize(("lm_head",), bits=8, activations=8),)), "quantize.activations", "lm_head has no"),
        (
            lambda: Recipe((Quantize(bits=8, activations=8),), target=Target("cuda")),
            "quantize.activations",
            "no kernels",
        ),
        (lambda: Recipe((Correct(4),)), "correct", "only weight-only"),
        (lambda: Recipe((TABLE, Correct(4))), "correct", "only weight-only"),
        (lambda: Recipe((Quantize(bits=8, activations=8), Correct(4))), "correct", "only weight-only"),
        (lambda: Recipe((CAP, INT4, Correct(4))), "correct", "cap leaves factor pairs"),
        (lambda: Recipe((OPEN, AUTO, Correct(4)), budget=SIZE), "correct", "does not price corrections"),
        (lambda: Recipe((CAP,), CalibrationOptions(prefix=True)), "calibration.prefix", "compressed prefix"),
        (lambda: Recipe((Prepare(("fold",)), CARRY)), "quantize.with", "which prepare does"),
        (lambda: Recipe((PRUNE, CARRY)), "quantize.with", "which prune does"),
        (lambda: Recipe((CARRY, HEAL)), "quantize.with", "which heal does"),
        (lambda: Recipe((Factorize(keep=0.9), CARRY)), "quantize.with", "which factorize does"),
        (lambda: Recipe((CARRY, Quantize(TABLES, bits="auto")), budget=SIZE), "quantize.with", "which a budget does"),
    ],
)  # fmt: skip
def test_steps_that_contradict_each_other(build: Callable[[], Recipe], where: str, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        build()
    assert caught.value.where == where
    assert caught.value.fix


def test_codes_are_carried_over_beside_what_moves_nothing() -> None:
    recipe = Recipe((PREPARE, CARRY, TABLE))
    assert recipe.carries
    assert recipe.quantizer == "gptq"  # of what cannot be carried over
    assert recipe.prepared_for is None


def test_one_step_says_for_all_how_numbers_are_rounded() -> None:
    assert Recipe((INT4, Quantize(TABLES, quantizer="rtn"))).quantizer == "rtn"
    assert Recipe((INT4, TABLE)).quantizer == "gptq"


# --- how much stays


@pytest.mark.parametrize("step", [CAP, SSLC, BASEL, CapOptions(size=9e7)], ids=lambda step: step.name)
def test_a_step_that_says_how_much_stays_takes_no_budget(step: Step) -> None:
    with pytest.raises(InputError, match=f"the step {step.name} says how much stays") as caught:
        Recipe((step,), budget=SHARE)
    assert caught.value.where == "budget"


@pytest.mark.parametrize("amount", [{"keep": 0.9}, {"rank": 8}, {"energy": 0.9}])
def test_a_rank_rule_and_a_budget_are_two_amounts(amount: dict[str, float]) -> None:
    (name,) = amount
    with pytest.raises(InputError, match=rf"factorize\.{name} and the budget both say how much stays"):
        Recipe((Factorize(**amount),), budget=SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "budget"),
    [
        ((INT4, TABLE), SIZE),
        ((INT4, TABLE), SHARE),
        ((AUTO,), SHARE),  # parameters have no bits
        ((), SIZE),
        ((Factorize(()), INT4), SIZE),
    ],
)
def test_a_budget_that_has_nothing_to_decide(steps: tuple[Step, ...], budget: Budget) -> None:
    with pytest.raises(InputError, match="leave nothing open") as caught:
        Recipe(steps, budget=budget)
    assert caught.value.where == "budget"
    assert "add a step factorize" in str(caught.value.fix)


@pytest.mark.parametrize(
    "steps", [(OPEN,), (OPEN, INT4), (AUTO,), (INT4, Quantize(TABLES, bits="auto")), (Factorize(()), AUTO)]
)
def test_a_budget_decides_what_is_open(steps: tuple[Step, ...]) -> None:
    assert Recipe(steps, budget=SIZE).limit == SIZE


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (Factorize(("qk",)), "groups"),
        (Factorize(form="identity"), "form"),
        (Factorize(qk="per-head"), "qk"),
        (Factorize(gauge="balanced"), "gauge"),
        (Factorize(rank_multiple=8), "rank_multiple"),
    ],
)
def test_how_is_not_said_without_how_much(step: Factorize, field: str) -> None:
    with pytest.raises(InputError, match="nothing says how much stays of the groups") as caught:
        Recipe((step,))
    assert caught.value.where == f"factorize.{field}"


def test_a_budget_takes_q_and_k_whole() -> None:
    with pytest.raises(InputError, match="takes q and k whole") as caught:
        Recipe((Factorize(("qk",), qk="per-head"),), budget=SHARE)
    assert caught.value.where == "factorize.qk"


def test_without_an_amount_nothing_is_factorized() -> None:
    recipe = Recipe((OPEN, INT4))
    assert (recipe.rank, recipe.limit, recipe.weighs_outputs) == (None, None, False)
    assert list(recipe.describe()) == ["layers in INT4 in blocks of 32"]


# --- with a step


def test_a_step_takes_the_place_of_its_kind() -> None:
    recipe = Recipe((PREPARE, Factorize(keep=0.9), INT4, TABLE))
    changed = recipe.with_step(Factorize(rank=8))
    assert changed.steps == (PREPARE, Factorize(rank=8), INT4, TABLE)
    assert recipe.steps[1] == Factorize(keep=0.9)
    first = recipe.with_step(Quantize(bits=8))
    assert first.steps == (PREPARE, Factorize(keep=0.9), Quantize(bits=8), TABLE)


@pytest.mark.parametrize(
    ("step", "place"),
    [(PRUNE, 0), (Factorize(keep=0.9), 1), (Correct(4), 3), (HEAL, 3)],
    ids=lambda one: getattr(one, "name", str(one)),
)
def test_a_new_step_goes_where_its_stage_belongs(step: Step, place: int) -> None:
    changed = Recipe((PREPARE, INT4, TABLE)).with_step(step)
    assert changed.steps.index(step) == place
    assert len(changed.steps) == 4


def test_a_step_that_contradicts_the_others_is_refused() -> None:
    with pytest.raises(InputError, match="cap decides already"):
        Recipe((CAP,)).with_step(SSLC)


def test_the_rest_of_the_recipe_stays() -> None:
    recipe = Recipe((OPEN, AUTO), UNWEIGHED, SIZE, Target("portable"))
    changed = recipe.with_step(PREPARE)
    assert (changed.calibration, changed.budget, changed.target) == (UNWEIGHED, SIZE, Target("portable"))


# --- with a budget


@pytest.mark.parametrize("budget", [SIZE, Budget("mean_bits", 4.5), Budget("speed_up", 2)])
def test_open_formats_are_enough_for_a_budget(budget: Budget) -> None:
    assert Recipe((PREPARE, AUTO)).with_budget(budget) == Recipe((PREPARE, AUTO), budget=budget)


@pytest.mark.parametrize(
    ("steps", "budget"), [((INT4, TABLE), SIZE), ((AUTO,), SHARE), ((PREPARE, INT4), SHARE), ((), SHARE)]
)
def test_what_leaves_nothing_open_may_be_factorized(
    steps: tuple[Step, ...], budget: Budget, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="rk_export.options.recipe"):
        changed = Recipe(steps).with_budget(budget)
    assert changed == Recipe(steps).with_step(OPEN).with_budget(budget)
    assert changed.budget == budget
    assert f"so that the {budget.name} can be met" in caplog.text


def test_a_budget_takes_the_place_of_another_one() -> None:
    assert Recipe((OPEN, AUTO), budget=SIZE).with_budget(SHARE).budget == SHARE


@pytest.mark.parametrize(
    ("step", "budget", "changed"),
    [
        (Factorize(("qk",), keep=0.5), SHARE, Factorize(("qk",), keep=0.9)),
        (Factorize(rank=8), SHARE, Factorize(keep=0.9)),
        (Factorize(energy=0.5, gauge="balanced"), SHARE, Factorize(keep=0.9, gauge="balanced")),
        (CAP, SHARE, CapOptions(keep=0.9)),
        (CapOptions(keep=0.5, selector="pools"), SIZE, CapOptions(size=9e7, selector="pools")),
        (SslcOptions(size=1e6), SHARE, SslcOptions(keep=0.9)),
        (BaselOptions(TASK, energy=0.4, tune=3), SHARE, BaselOptions(TASK, keep=0.9, tune=3)),
    ],
)
def test_a_step_that_says_how_much_stays_gets_the_amount(step: Step, budget: Budget, changed: Step) -> None:
    recipe = Recipe((PREPARE, step, INT4)).with_budget(budget)
    assert recipe.steps == (PREPARE, changed, INT4)
    assert recipe.budget is None


@pytest.mark.parametrize(
    ("step", "budget", "what"),
    [
        (Factorize(keep=0.5), SIZE, "already says how much stays: factorize.keep"),
        (Factorize(rank=8), Budget("speed_up", 2), "already says how much stays: factorize.rank"),
        (CAP, Budget("mean_bits", 4), "no price in mean bits"),
        (SSLC, Budget("speed_up", 2), "no price in speed-up"),
        (BASEL, SIZE, "ends at a share"),
    ],
)
def test_an_amount_that_a_step_cannot_take(step: Step, budget: Budget, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        Recipe((step,)).with_budget(budget)
    assert caught.value.where == budget.flag
    assert caught.value.fix


# --- what is asked of a whole recipe


def test_a_recipe_says_what_it_does() -> None:
    steps = (PRUNE, PREPARE, CAP, INT4, TABLE, HEAL)
    assert list(Recipe(steps).describe()) == [
        "structured pruning",
        "low rank plus sparse matrices (arXiv 2505.03801)",
        "layers in INT4 in blocks of 32",
        "embed_tokens and lm_head in INT8 in blocks of 32",
        "recovery by distillation",
    ]


@pytest.mark.parametrize(
    ("recipe", "spec"),
    [
        (Recipe((PREPARE, INT4)), QuantSpec(4, 32)),
        (Recipe((PREPARE, Quantize(bits=8, activations=8))), W8A8),
        (Recipe((PREPARE, OPEN, AUTO), budget=SIZE), QuantSpec(4, 32)),
        (Recipe((PREPARE, OPEN, AUTO), budget=Budget("speed_up", 2)), W8A8),
        (Recipe((Prepare(("fold",)), INT4)), None),
        (Recipe((PREPARE,)), None),
        (Recipe((INT4,)), None),
        (Recipe((PREPARE, INT4), UNWEIGHED), None),
    ],
)
def test_the_format_that_preparations_are_chosen_for(recipe: Recipe, spec: QuantSpec | None) -> None:
    assert recipe.prepared_for == spec


def test_a_text_is_found_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words")
    recipe = Recipe(calibration=CalibrationOptions(TextFile.of(path)))
    moved = Recipe(calibration=CalibrationOptions(TextFile("old name", TextFile.of(path).sha256)))
    assert recipe.missing_text is None
    assert moved.missing_text is not None
    assert moved.with_texts((path,)).missing_text is None
    path.write_text("other words")
    assert moved.with_texts((path,)).missing_text is not None
