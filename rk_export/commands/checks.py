"""What is refused before any work: options that do not go with a model or with each other."""

from __future__ import annotations

from rk_export.errors import InputError
from rk_export.methods.basel.selection import check_selection
from rk_export.methods.cap.choose import amount_of
from rk_export.methods.cap.pools import check_source
from rk_export.methods.plans import sparse_budget, stored_prices
from rk_export.methods.prune.pruned import check_blocks, kept_width
from rk_export.model.context import check_context
from rk_export.model.pruned_description import check_decoder, pruned_description
from rk_export.options.compress import CompressOptions
from rk_export.options.methods import PruneOptions
from rk_export.plan import Pruning
from rk_export.planning.cost_table import TIMED_CONTEXT
from rk_export.planning.planner import check_groups, check_size, with_default_groups
from rk_export.rewrite.changes import task_tokens
from rk_export.source.protocol import Source


def check_options(source: Source, options: CompressOptions) -> None:
    """Refuse, before any work, options that do not go with a model or with each other.

    Raises:
        InputError: If a group matches nothing, a method or a budget lacks the statistics that it needs, the model
            cannot lose what is to go, or a task's text cannot be used.
    """
    check_context(source.description, options.context_length)
    check_groups(source, with_default_groups(source, options).groups or ())
    _check_budget(source, options)
    if options.heal and (source.architecture.is_encoder or not options.calibration.uses_text):
        raise InputError(
            "recovery trains a decoder on text", where="--heal", fix="choose --metric self or corpus:FILE"
        )
    if options.recompute == "none" and not source.has_grids:
        details = [finding.details or {} for finding in source.findings]
        stored = next((str(one["format"]) for one in details if "format" in one), "")
        raise InputError(
            f"there are no codes to carry over: the model is stored {f'as {stored}' if stored else 'in floats'}",
            where="--recompute",
            fix="drop it, or name a checkpoint that GPTQ, AWQ or compressed-tensors quantized to integers",
        )
    if options.prune is not None:
        _check_prune(source, options, options.prune)
    if options.basel is not None and options.rank is not None:
        check_selection(source, options.rank, options.basel)
        task_tokens(source, options.basel)
    if options.cap is not None:
        check_source(source)
        amount_of(source, sparse_budget(source, options), stored_prices(options))


def _check_budget(source: Source, options: CompressOptions) -> None:
    budget = options.budget
    if budget is None:
        return
    if source.architecture.is_encoder:
        raise InputError(
            "an encoder has no loss that a budget could be planned by",
            where=f"--{budget.kind.replace('_', '-')}",
            fix="give --uniform, which keeps the same share of every group",
        )
    if not options.calibration.uses_text:
        raise InputError(
            f"a budget needs statistics, which the metric {options.calibration.metric} does not gather",
            where="--metric",
            fix="choose self or corpus:FILE, or give --uniform",
        )
    if budget.kind == "size" and options.cap is None and options.prune is None:
        check_size(source, options)
    if budget.kind == "speed_up":
        _check_speed_up(source, options)


def _check_speed_up(source: Source, options: CompressOptions) -> None:
    if options.ep != "cpu":
        raise InputError(
            f"products are timed on the CPU provider, the graph is made for {options.ep}",
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


def _check_prune(source: Source, options: CompressOptions, prune: PruneOptions) -> None:
    check_decoder(source.description)
    check_blocks(source.layer_count, prune)
    if prune.blocks and not options.calibration.uses_text:
        raise InputError(
            f"blocks are judged on text, which the metric {options.calibration.metric} does not read",
            where="--prune-blocks",
            fix="choose --metric self or corpus:FILE",
        )
    kept = tuple(range(source.layer_count - prune.blocks))
    groups: tuple[tuple[int, ...], ...] = ()
    if prune.kv_groups is not None:
        groups = (tuple(range(prune.kv_groups)),) * len(kept)
    pruned_description(source.description, Pruning(kept, kept_width(source, prune.ffn), groups))
