"""What compression starts from: the model that is compressed, calibration text, statistics, and what methods decided.

All of it depends on the model and on the options alone, and what is costly is kept on disk: applying the same
plan to the same model again, as `verify` does, finds it there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.layer_statistics import (
    FromDense,
    FromGains,
    FromPrefix,
    LayerStatistics,
    NoStatistics,
)
from rk_export.calibration.model_statistics import diagonals_finding, model_statistics, only_diagonals
from rk_export.calibration.neuron_peaks import shortened
from rk_export.calibration.self_text import dense_writer_bytes, needs_other_writer, writer_limit
from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.calibration.table_statistics import table_curvature
from rk_export.calibration.uniform_text import REASON as UNIFORM
from rk_export.commands.int4_writer import int4_text
from rk_export.commands.preparations import decided_preparations, prepared_source
from rk_export.device import CPU
from rk_export.methods.base import Decision, Method, Work, methods_of
from rk_export.methods.sparse_sites import check_parts
from rk_export.model.torch_logits import torch_logits
from rk_export.options.prepare import PARTS_OF_FOLD, Prepare
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.options.step import MethodOptions
from rk_export.parity.preflight import dense_logits
from rk_export.passes.numerics.predicted_loss import TableCurvature
from rk_export.plan import Plan, Pruning
from rk_export.planning.planner import with_default_groups
from rk_export.report.humanize import size
from rk_export.report.records import Finding, Outcome
from rk_export.rewrite.ahead import finish_ahead
from rk_export.rewrite.apply import DENSE, Rewritten, rewrite
from rk_export.rewrite.layer_store import LayerStore
from rk_export.rewrite.layer_work import LayerWork
from rk_export.scratch import laid_down
from rk_export.source.memory import Memory
from rk_export.source.protocol import Source
from rk_export.source.transformed import Transformed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionInputs:
    """The start of a compression.

    Args:
        dense: The dense model, reparameterized as the options ask.
        work: What is compressed, with its statistics: the dense model after every method's `transform`.
        methods: The methods that were asked for.
        teacher: The model that recovery aims at.
        table: What errors of the embedding cost; None like the statistics.
        decision: What a method decided about every matrix; None leaves that to the planner.
        choice: What each reparameterization would have cost.
        left_out: What was asked for and could not be had, with the reason.
        dense_logits: Of `dense` on the probe, where `source` is another model and a probe was given.
        folder: Whose disk holds what need not stay in memory.
    """

    dense: Transformed
    work: Work
    methods: Sequence[Method[MethodOptions]]
    teacher: Transformed
    table: TableCurvature | None = None
    decision: Decision | None = None
    choice: tuple[Finding, ...] = ()
    left_out: tuple[Finding, ...] = ()
    dense_logits: Tensor | None = None
    folder: Path | None = None

    @property
    def source(self) -> Transformed:
        """The model that is compressed."""
        return self.work.source

    @property
    def recipe(self) -> Recipe:
        """What was asked for, the reparameterizations named."""
        return self.work.recipe

    @property
    def statistics(self) -> DenseStatistics | None:
        """Of `source`; None where the metric uses no text."""
        return self.work.statistics

    def rewrite(
        self,
        plan: Plan,
        probe: Tensor | None = None,
        store: LayerStore | None = None,
        run: Run | None = None,
    ) -> Rewritten:
        """Apply a plan to the model, under what is known about it.

        Args:
            plan: The plan.
            probe: Tokens (batch, length) that run alongside.
            store: Where finished layers of this run lie, and are kept.
            run: How many processes finish layers; without a store and a folder it is this one.

        Raises:
            InputError: If the plan does not fit the model, or asks for other sparse parts than were chosen.
            RkExportError: As `finish_ahead`.
        """
        parts = {} if self.decision is None else self.decision.parts
        check_parts(plan, parts)
        statistics = self.layer_statistics()
        if store is not None and self.folder is not None:
            work = LayerWork(self.source, plan, statistics, parts, store, self.work.device)
            finish_ahead(work, self.folder, run or Run())
        dense = self.dense_logits
        if dense is None and probe is not None and self.source is not self.dense:
            dense, _ = dense_logits(self.dense, probe)
        rewritten = rewrite(
            self.source,
            plan,
            statistics=statistics,
            table_inputs=None if self.table is None else self.table.head.inputs,
            parts=parts,
            probe=probe,
            device=self.work.device,
            store=store,
            folder=self.folder,
        )
        logits = rewritten.probe_logits
        if dense is not None:
            # The first tier tells what all methods did, pruning and tuning included.
            logits = {**logits, DENSE: dense}
        self.source.forget()
        return replace(rewritten, findings=(*self.findings, *rewritten.findings), probe_logits=logits)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was dequantized, reparameterized and changed by methods, what was not, and what else was left out."""
        told = {finding.target for finding in self.choice}
        if f"prepare.{PARTS_OF_FOLD[0]}" in told:
            told.add("prepare.fold")  # its parts tell of it
        others = (finding for finding in self.source.findings if finding.target not in told)
        own = (finding for method in self.methods for finding in method.findings)
        return (*self.choice, *others, *own, *self.left_out)

    def layer_statistics(self) -> LayerStatistics:
        """Return where the statistics of the layers' sites come from."""
        calibration, architecture = self.recipe.calibration, self.source.architecture
        if calibration.metric == "gain":
            return FromGains(self.source.description)
        if self.statistics is None or self.work.tokens is None:
            return NoStatistics()
        dense = FromDense(self.statistics)
        return FromPrefix(dense, self.work.tokens, architecture) if calibration.prefix else dense


def compression_inputs(
    source: Source,
    recipe: Recipe,
    device: torch.device = CPU,
    *,
    pruning: Pruning | None = None,
    states: Callable[[str], Path] | None = None,
    probe: Tensor | None = None,
    folder: Path | None = None,
) -> CompressionInputs:
    """Reparameterize a model, let every method change it, and gather what the others need to know about it.

    Args:
        source: The dense model.
        recipe: What was asked for.
        device: Where to compute.
        pruning: What a plan says stays; None chooses as the options ask.
        states: From a method's name to the file that its training keeps its state in, to go on after an
            interruption; None keeps none.
        probe: Tokens (batch, length) that the model is to be rewritten on, as in `CompressionInputs.rewrite`.
        folder: Whose disk takes what need not stay in memory; the cache's when None.

    Raises:
        InputError: If a text cannot be read, the preparations do not go together, or the options ask for more than
            the model can lose.
    """
    weighs = weighs_errors(recipe)
    dense = Transformed(source, (), Memory(folder))
    tokens = _tokens(dense, recipe, device, folder)
    choice = decided_preparations(dense, recipe, tokens, device, folder)
    if recipe.find(Prepare) is not None:
        recipe = recipe.with_step(Prepare(choice.names))
    dense = teacher = prepared_source(dense, recipe, tokens, device)
    work = Work(dense, recipe, device, tokens, pruning=pruning)
    methods = methods_of(recipe)
    for method in methods:
        state = None if states is None else states(method.options.name)
        work = replace(work, source=method.transform(replace(work, state=state)))
        teacher = work.source if method.sets_target else teacher
    started = CompressionInputs(dense, work, methods, teacher, choice=choice.findings, folder=folder)
    if probe is not None and work.source is not dense:
        logits = laid_down(torch_logits(dense.shared().to("cpu"))(probe.numpy()))
        started = replace(started, dense_logits=logits)
    if tokens is not None and recipe.calibration.metric == "self":
        started = replace(started, choice=(*started.choice, *_writer_findings(source, device)))
    if tokens is None or not weighs:
        started = replace(started, left_out=tuple(_left_out(source, recipe)))
    else:
        started = _with_statistics(started, tokens)
    return replace(started, decision=_decision(methods, started.work))


def _tokens(source: Source, recipe: Recipe, device: torch.device, folder: Path | None) -> Tensor | None:
    """Return the calibration text, or None where nothing reads one."""
    if not reads_text(source, recipe):
        return None
    return calibration_tokens(source, recipe.calibration, device, partial(int4_text, folder=folder))


def reads_text(source: Source, recipe: Recipe) -> bool:
    """Whether calibration text is written or read for a recipe."""
    if not recipe.calibration.uses_text:
        return False
    return weighs_errors(recipe) or any(method.reads_text for method in recipe.methods)


def _with_statistics(started: CompressionInputs, tokens: Tensor) -> CompressionInputs:
    """Return the start with the statistics of the model as methods left it."""
    work = started.work
    directions = weighs_directions(work.source, work.recipe)
    statistics = model_statistics(
        work.source, tokens, work.recipe, work.device, directions=directions, folder=started.folder
    )
    table = table_curvature(work.source, shortened(tokens), work.device, statistics.embedding)
    reduced = directions and only_diagonals(work.source, work.recipe)
    left_out = (diagonals_finding(work.source),) if reduced else ()
    return replace(started, work=replace(work, statistics=statistics), table=table, left_out=left_out)


def _decision(methods: Sequence[Method[MethodOptions]], work: Work) -> Decision | None:
    decisions = (method.decide(work) for method in methods)
    return next((decision for decision in decisions if decision is not None), None)


def weighs_errors(recipe: Recipe) -> bool:
    """Whether anything that was asked for weighs errors by statistics."""
    rounds = recipe.quant is not None or recipe.table_quant is not None
    recovers = any(method.stage == "recover" for method in recipe.methods)
    compensates = rounds and recipe.quantizer != "rtn"
    return bool(recipe.limit or recipe.rank or recovers or compensates)


def weighs_directions(source: Source, recipe: Recipe) -> bool:
    """Whether errors are weighed along directions of the outputs; rounding weighs every output on its own."""
    factorizes = bool(with_default_groups(source, recipe).groups)
    return factorizes or any(method.weighs_outputs for method in recipe.methods)


def _writer_findings(source: Source, device: torch.device) -> Iterator[Finding]:
    """Yield the finding that says who wrote the calibration text, if it is not the dense model."""
    reason = ""
    if source.architecture.is_encoder:
        reason = UNIFORM
        logger.warning("%s: %s; set calibration.text to a file of your own", source.title, reason)
    elif needs_other_writer(source, device):
        needed = size(dense_writer_bytes(source, device))
        reason = (
            f"the model in INT4 wrote it: dense it takes {needed}, more than {size(writer_limit(device))}"
        )
    if reason:
        yield Finding("calibration.text", Outcome.APPLIED, reason, details={"pass": "text"})


def _left_out(source: Source, recipe: Recipe) -> Iterator[Finding]:
    """Yield what a model without calibration text goes without."""
    if "scale" in recipe.preparations:
        yield Finding(
            "prepare.scale", Outcome.SKIPPED, "without calibration text there are no peaks to even out"
        )
