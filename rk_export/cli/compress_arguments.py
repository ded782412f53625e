"""Command-line arguments that make a recipe."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from rk_export.errors import FieldError, InputError

if TYPE_CHECKING:
    from rk_export.options.ranks import Budget
    from rk_export.options.recipe import Recipe

_PHASE = "budget.phase="


def add_recipe_arguments(parser: argparse.ArgumentParser, *, target: bool = True) -> None:
    """Add what says which recipe is followed, at which amount, and, if asked for, where the bundle will run."""
    recipe = parser.add_argument_group("what is done")
    recipe.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="a preset or a recipe file (default: default, the best model of plain INT4's size); "
        "`rk-export recipes` lists the presets",
    )
    recipe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STEP.FIELD=VALUE",
        help="set one field of the recipe, such as heal.steps=100; may be repeated",
    )
    budget = parser.add_argument_group("how much stays (one of them)").add_mutually_exclusive_group()
    budget.add_argument("--size", help="bytes of the model's files: 90MB, 1.2GB")
    budget.add_argument("--keep", type=float, metavar="SHARE", help="share of the parameters: 0.9")
    budget.add_argument("--mean-bits", type=float, metavar="BITS", help="mean bits of a weight: 4.5")
    budget.add_argument(
        "--speed-up",
        type=float,
        metavar="FACTOR",
        help="dense time over compressed time, measured here: 1.8 (of decode; --set budget.phase=prefill)",
    )
    if not target:
        return
    parser.add_argument_group("where it will run").add_argument(
        "--ep",
        choices=("cpu", "cuda", "portable"),
        help="cpu (fp32), cuda (fp16) or portable (fp16) (default: as the recipe says, else cpu)",
    )


def asked_recipe(args: argparse.Namespace) -> Recipe | None:
    """Return the recipe that was asked for, or None if nothing was said about it.

    Raises:
        InputError: If there is no such recipe, a value cannot be used, or two arguments do not go together.
    """
    from rk_export.recipes import DEFAULT, load

    amount, ep = _budget(args), getattr(args, "ep", None)
    if args.recipe is None and not args.set and amount is None and ep is None:
        return None
    settings = [text for text in args.set if amount is None or not text.startswith(_PHASE)]
    recipe = load(DEFAULT if args.recipe is None else args.recipe, settings, amount)
    if ep is not None:
        recipe = replace(recipe, target=replace(recipe.target, ep=ep))
    return recipe


def _budget(args: argparse.Namespace) -> Budget | None:
    """Return the budget that a flag asks for; the phase of a speed-up is a setting, which belongs to it."""
    from rk_export.options.ranks import BUDGET_KINDS, Budget, bytes_of

    for kind in BUDGET_KINDS:
        if (value := getattr(args, kind)) is not None:
            break
    else:
        return None
    phases = [text.removeprefix(_PHASE) for text in args.set if text.startswith(_PHASE)]
    flag = f"--{kind.replace('_', '-')}"
    if any(text.startswith("budget.") for text in args.set) and not phases:
        raise InputError("the recipe's budget is set too", where=flag, fix="give one of the two")
    try:
        return Budget(kind, bytes_of(value), **({"phase": phases[-1]} if phases else {}))
    except FieldError as error:
        where = flag if error.where == kind else error.where
        raise InputError(error.what, where=where, fix=error.fix) from error
