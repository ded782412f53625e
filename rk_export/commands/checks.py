"""What is refused before any work: options that do not go with a model or with each other."""

from __future__ import annotations

from rk_export.errors import InputError
from rk_export.methods.base import methods_of
from rk_export.model.context import check_context
from rk_export.options.recipe import Recipe
from rk_export.planning.cost_table import TIMED_CONTEXT
from rk_export.planning.planner import check_groups, check_size, with_default_groups
from rk_export.source.protocol import Source


def check_options(source: Source, recipe: Recipe) -> None:
    """Refuse, before any work, options that do not go with a model or with each other.

    Raises:
        InputError: If a group matches nothing, a method or a budget lacks the statistics that it needs, the model
            cannot lose what is to go, or a task's text cannot be used.
    """
    check_context(source.description, recipe.context_length)
    check_groups(source, with_default_groups(source, recipe).groups or ())
    _check_budget(source, recipe)
    if recipe.recompute == "none" and not source.has_grids:
        details = [finding.details or {} for finding in source.findings]
        stored = next((str(one["format"]) for one in details if "format" in one), "")
        raise InputError(
            f"there are no codes to carry over: the model is stored {f'as {stored}' if stored else 'in floats'}",
            where="--recompute",
            fix="drop it, or name a checkpoint that GPTQ, AWQ or compressed-tensors quantized to integers",
        )
    for method in methods_of(recipe):
        method.check(source, recipe)


def _check_budget(source: Source, recipe: Recipe) -> None:
    budget = recipe.budget
    if budget is None:
        return
    if source.architecture.is_encoder:
        raise InputError(
            "an encoder has no loss that a budget could be planned by",
            where=f"--{budget.kind.replace('_', '-')}",
            fix="give --uniform, which keeps the same share of every group",
        )
    if not recipe.calibration.uses_text:
        raise InputError(
            f"a budget needs statistics, which the metric {recipe.calibration.metric} does not gather",
            where="--metric",
            fix="choose self or corpus:FILE, or give --uniform",
        )
    if budget.kind == "size" and all(method.sized_by_shapes for method in recipe.methods):
        check_size(source, recipe)
    if budget.kind == "speed_up":
        _check_speed_up(source, recipe)


def _check_speed_up(source: Source, recipe: Recipe) -> None:
    if recipe.ep != "cpu":
        raise InputError(
            f"products are timed on the CPU provider, the graph is made for {recipe.ep}",
            where="--speed-up",
            fix="use --ep cpu, or a budget of --size or --keep",
        )
    context = int(source.config.max_position_embeddings)
    if context < TIMED_CONTEXT:
        raise InputError(
            f"the model's context of {context} tokens is shorter than the {TIMED_CONTEXT} that are timed",
            where="--speed-up",
            fix="choose another budget",
        )
