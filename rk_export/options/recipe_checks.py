"""What a recipe refuses as a whole: an order that makes no sense, two amounts, formats that cannot stand together."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rk_export.errors import FieldError
from rk_export.options.factorize import Factorize
from rk_export.options.prepare import Prepare
from rk_export.options.quantize import TABLES, Quantize, names_of_table
from rk_export.options.ranks import Budget
from rk_export.options.step import STAGES

if TYPE_CHECKING:
    from rk_export.options.recipe import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse steps and settings that contradict each other.

    Raises:
        InputError: Names the contradiction.
    """
    _check_order(recipe)
    _check_quantize(recipe)
    _check_amount(recipe)
    for step in recipe.steps:
        step.check_with(recipe)
    if recipe.deciding is not None and recipe.calibration.prefix:
        raise FieldError(
            f"the parts of {recipe.deciding.name} do not depend on the compressed prefix",
            where="calibration.prefix",
            fix="drop it",
        )


def _check_order(recipe: Recipe) -> None:
    for first, second in pairwise(recipe.steps):
        free = {"prune", "prepare"}
        if STAGES.index(first.stage) > STAGES.index(second.stage) and {first.stage, second.stage} != free:
            raise FieldError(f"it stands after {first.name}", where=second.name, fix="exchange the two")
    for stage in STAGES:
        steps = [step for step in recipe.steps if step.stage == stage]
        if len(steps) < 2 or steps[0].repeats:
            continue
        one, other = steps[0].name, steps[1].name
        if one == other:
            raise FieldError("the step stands twice", where=other, fix="drop one of the two")
        raise FieldError(
            f"{one} decides already what stays of every matrix",
            where=other,
            fix="choose one of the two",
        )


def _check_quantize(recipe: Recipe) -> None:
    rounding = {step.quantizer for step in recipe.quantize_steps if step.quantizer is not None}
    if len(rounding) > 1:
        raise FieldError(
            f"{' and '.join(sorted(rounding))} cannot round the same model",
            where="quantize.with",
            fix="give it in one step: it holds for all",
        )
    for table in TABLES:
        step = recipe.quantize_step_of(names_of_table(table))
        if step is not None and step.activations == 8:
            raise FieldError(
                f"{table} has no inputs to quantize",
                where="quantize.activations",
                fix="leave it out of the targets",
            )
    if recipe.target.ep != "cpu" and any(step.activations == 8 for step in recipe.quantize_steps):
        raise FieldError(
            f"int8 inputs have no kernels in a graph for {recipe.target.ep}",
            where="quantize.activations",
            fix="use them with ep: cpu, or choose weight-only quantization",
        )
    if recipe.carries:
        _check_carried(recipe)


def _check_carried(recipe: Recipe) -> None:
    """Refuse what would change matrices whose codes are to stay."""
    changing = [step.name for step in recipe.steps if not isinstance(step, (Quantize, Prepare))]
    if isinstance(prepare := recipe.find(Prepare), Prepare) and prepare.names not in ("auto", ()):
        changing.append(prepare.name)
    if recipe.budget is not None:
        changing.append("a budget")
    if changing:
        raise FieldError(
            f"codes that are carried over cannot be changed, which {changing[0]} does",
            where="quantize.with",
            fix=f"drop {changing[0]}, or with: carry",
        )


def _check_amount(recipe: Recipe) -> None:
    factorize = recipe.find(Factorize)
    if recipe.budget is not None:
        _check_budget(recipe, recipe.budget, factorize)
    elif factorize is not None and factorize.rule is None and (field := factorize.first_set):
        raise FieldError(
            "nothing says how much stays of the groups",
            where=f"factorize.{field}",
            fix="give keep, rank or energy, or a budget",
        )


def _check_budget(recipe: Recipe, budget: Budget, factorize: Factorize | None) -> None:
    """Refuse a budget beside another amount, and one that has nothing to decide."""
    if recipe.deciding is not None:
        raise FieldError(
            f"the recipe has a budget, and the step {recipe.deciding.name} says how much stays",
            where="budget",
            fix="give one of the two",
        )
    if factorize is not None and factorize.rule is not None:
        raise FieldError(
            f"factorize.{factorize.rule.kind} and the budget both say how much stays",
            where="budget",
            fix="drop one of the two",
        )
    if factorize is not None and factorize.qk == "per-head":
        raise FieldError(
            "a budget takes q and k whole",
            where="factorize.qk",
            fix="drop it, or give factorize.keep instead of the budget",
        )
    factorizes = factorize is not None and factorize.groups != ()
    if not factorizes and (budget.kind == "keep" or not recipe.has_open_formats):
        raise FieldError(
            f"the steps leave nothing open that the {budget.name} could decide",
            where="budget",
            fix="add a step factorize"
            if budget.kind == "keep"
            else "add a step factorize, or set quantize.bits to auto",
        )
