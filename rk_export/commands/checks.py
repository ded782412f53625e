"""What is refused before any work: options that do not go with a model or with each other."""

from __future__ import annotations

from rk_export.errors import InputError
from rk_export.methods.base import methods_of
from rk_export.model.context import check_context, own_context
from rk_export.model.sites import dense_sites
from rk_export.options.choices import nearest
from rk_export.options.quantize import TABLES, matches, names_of, names_of_table
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
    check_context(source.description, recipe.target.context_length)
    if source.architecture.is_encoder and recipe.calibration.metric == "gain":
        raise InputError(
            "what an encoder's matrices read is not told by gains: its norms stand on residual sums",
            where="calibration.text",
            fix="name a text, or set it to self or none",
        )
    check_groups(source, with_default_groups(source, recipe).groups or ())
    _check_formats(source, recipe)
    _check_budget(source, recipe)
    if recipe.carries and not source.has_grids:
        details = [finding.details or {} for finding in source.findings]
        stored = next((str(one["format"]) for one in details if "format" in one), "")
        raise InputError(
            f"there are no codes to carry over: the model is stored {f'as {stored}' if stored else 'in floats'}",
            where="quantize.with",
            fix="take another recipe, or name a checkpoint that GPTQ, AWQ or compressed-tensors quantized to integers",
        )
    for method in methods_of(recipe):
        method.check(source, recipe)


def _check_formats(source: Source, recipe: Recipe) -> None:
    """Refuse targets that match nothing, and formats that cannot be stored side by side."""
    tables = [names_of_table(name) for name in TABLES]
    names = [names_of(matrix.role, matrix.id.path, matrix.id.layer) for matrix in source.description.matrices]
    for pattern in recipe.patterns():
        if not any(matches(pattern, known) for known in (*names, *tables)):
            known = sorted({name for one in names for name in one[:3]} | set(TABLES))
            raise InputError(
                f"{pattern!r} matches no matrix of {source.title}",
                where="quantize",
                fix=f"{nearest(pattern, known)}name one of {', '.join(known)}, or a pattern such as {names[0][3]}",
            )
    if not source.architecture.is_encoder and recipe.head_quant != recipe.table_quant:
        if source.description.is_tied:
            what = "embed_tokens and lm_head are one matrix in this model"
        else:
            what = "embed_tokens and lm_head are stored in one format"
        raise InputError(what, where="quantize.targets", fix="name both: [embed_tokens, lm_head]")
    groups = with_default_groups(source, recipe).groups
    for layer in source.description.layers():
        dense_sites(layer, source.description.projections(layer.index), recipe, groups)


def _check_budget(source: Source, recipe: Recipe) -> None:
    budget = recipe.limit
    if budget is None:
        return
    if not recipe.calibration.uses_text:
        raise InputError(
            f"a budget needs statistics, which the metric {recipe.calibration.metric} does not gather",
            where="calibration.text",
            fix="set it to self, or to a file",
        )
    if (
        recipe.budget is not None
        and budget.kind == "size"
        and all(method.sized_by_shapes for method in recipe.methods)
    ):
        check_size(source, recipe)
    if budget.kind == "speed_up":
        _check_speed_up(source, recipe)


def _check_speed_up(source: Source, recipe: Recipe) -> None:
    if source.architecture.is_encoder:
        raise InputError(
            "the time of a whole model is measured on a decoder, and this is an encoder",
            where="--speed-up",
            fix="use a budget of --size or --keep, or --recipe w8a8",
        )
    if recipe.target.ep != "cpu":
        raise InputError(
            f"products are timed on the CPU provider, the graph is made for {recipe.target.ep}",
            where="--speed-up",
            fix="use --ep cpu, or a budget of --size or --keep",
        )
    context = own_context(source.config)
    if context < TIMED_CONTEXT:
        raise InputError(
            f"the model's context of {context} tokens is shorter than the {TIMED_CONTEXT} that are timed",
            where="--speed-up",
            fix="choose another budget",
        )
