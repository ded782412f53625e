"""What compression starts from: the model that is compressed, calibration text, statistics, chosen parts.

All of it depends on the model and on the options alone, and what is costly is kept on disk: applying the same
plan to the same model again, as `verify` does, finds it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics, Place
from rk_export.calibration.layer_statistics import (
    FromDense,
    FromGains,
    FromPrefix,
    LayerStatistics,
    NoStatistics,
)
from rk_export.calibration.model_statistics import diagonals_finding, model_statistics, only_diagonals
from rk_export.calibration.neuron_peaks import shortened
from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.calibration.table_statistics import table_curvature
from rk_export.device import resolve_device
from rk_export.methods.basel.selection import Selection
from rk_export.methods.cap.choose import cap_parts
from rk_export.methods.plans import check_parts, sparse_budget, stored_prices
from rk_export.model.torch_logits import torch_logits
from rk_export.options.compress import PARTS_OF_FOLD, CompressOptions
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.numerics.predicted_loss import TableCurvature
from rk_export.plan import Plan, Pruning
from rk_export.report.records import Finding, Outcome
from rk_export.rewrite.apply import DENSE, Rewritten, rewrite
from rk_export.rewrite.changes import decided_preparations, prepared_source, pruned_source, selected_bases
from rk_export.source.memory import Memory
from rk_export.source.protocol import Source
from rk_export.source.replaced import Replaced
from rk_export.source.transformed import Transformed


@dataclass(frozen=True)
class Groundwork:
    """The start of a compression.

    Args:
        dense: The dense model, reparameterized as the options ask.
        source: What is compressed: the dense model, pruned and tuned as the options ask.
        options: What was asked for, the reparameterizations named.
        statistics: Of `source`; None where the metric uses no text, or the model is an encoder.
        table: What errors of the embedding cost; None like the statistics.
        tokens: The calibration text, int64 (sequences, length); None where the metric uses none.
        selection: The bases that were selected for a task (2405.15877), `source` being folded from them.
        parts: The low rank and sparse parts that were chosen (2505.03801).
        choice: What each reparameterization would have cost.
        left_out: What was asked for and could not be had, with the reason.
        dense_logits: Of `dense` on the probe, where `source` is another model and a probe was given.
    """

    dense: Transformed
    source: Transformed
    options: CompressOptions
    statistics: DenseStatistics | None = None
    table: TableCurvature | None = None
    tokens: Tensor | None = None
    selection: Selection | None = None
    parts: Mapping[Place, Parts] | None = None
    choice: tuple[Finding, ...] = ()
    left_out: tuple[Finding, ...] = ()
    dense_logits: Tensor | None = None

    def rewrite(self, plan: Plan, probe: Tensor | None = None) -> Rewritten:
        """Apply a plan to the model, under what is known about it.

        Raises:
            InputError: If the plan does not fit the model, or asks for other sparse parts than were chosen.
        """
        check_parts(plan, self.parts or {})
        dense = self.dense_logits
        if dense is None and probe is not None and self.source is not self.dense:
            dense = torch_logits(self.dense.load())(probe.numpy())
        rewritten = rewrite(
            self.source,
            plan,
            statistics=self.layer_statistics(),
            table_inputs=None if self.table is None else self.table.inputs,
            parts=self.parts,
            probe=probe,
        )
        logits = rewritten.probe_logits
        if dense is not None:
            # The first tier tells what all methods did, pruning and tuning included.
            logits = {**logits, DENSE: dense}
        self.source.forget()
        return replace(rewritten, findings=(*self.findings, *rewritten.findings), probe_logits=logits)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was dequantized, reparameterized, pruned and tuned, what was not, and what else was left out."""
        tuned = () if self.selection is None else (self.selection.finding,)
        told = {finding.target for finding in self.choice}
        if f"prepare.{PARTS_OF_FOLD[0]}" in told:
            told.add("prepare.fold")  # its parts tell of it
        others = (finding for finding in self.source.findings if finding.target not in told)
        return (*self.choice, *others, *tuned, *self.left_out)

    def layer_statistics(self) -> LayerStatistics:
        """Return where the statistics of the layers' sites come from."""
        calibration, architecture = self.options.calibration, self.source.architecture
        if calibration.metric == "gain":
            return FromGains(self.source.description)
        if self.statistics is None or self.tokens is None:
            return NoStatistics()
        dense = FromDense(self.statistics)
        return FromPrefix(dense, self.tokens, architecture) if calibration.prefix else dense


def groundwork(
    source: Source,
    options: CompressOptions,
    *,
    pruning: Pruning | None = None,
    state: Path | None = None,
    probe: Tensor | None = None,
) -> Groundwork:
    """Reparameterize, prune and tune a model as the options ask, and gather what they need to know about it.

    Args:
        source: The dense model.
        options: What was asked for.
        pruning: What a plan says stays; None chooses as the options ask.
        state: Where training for a task keeps its state, to go on after an interruption; None keeps none.
        probe: Tokens (batch, length) that the model is to be rewritten on, as in `Groundwork.rewrite`.

    Raises:
        InputError: If a text cannot be read, the preparations do not go together, or the options ask for more than
            the model can lose.
    """
    device = resolve_device(options.device)
    source = Transformed(source, (), Memory())
    tokens = None
    weighs = _weighs_errors(options)
    reads_text = options.calibration.uses_text and not source.architecture.is_encoder
    if reads_text and (weighs or options.prune is not None):
        tokens = calibration_tokens(source, options.calibration, device)
    choice = decided_preparations(source, options, tokens, device)
    options = replace(options, prepare=choice.names)
    dense = prepared_source(source, options, tokens, device)
    dense_logits = None
    if probe is not None and (options.prune or options.basel or pruning):
        dense_logits = torch_logits(dense.shared().to("cpu"))(probe.numpy())
    changed = pruned_source(dense, options, pruning, tokens, device)
    selection = None
    if options.basel is not None:
        selection = selected_bases(changed, options, device, state)
        changed = changed.then(Replaced(selection.tensors))
    if tokens is None or not weighs:
        left_out = tuple(_left_out(source, options))
        return Groundwork(
            dense,
            changed,
            options,
            selection=selection,
            choice=choice.findings,
            left_out=left_out,
            dense_logits=dense_logits,
        )
    statistics = model_statistics(changed, tokens, options)
    priced = options.budget is not None
    table = table_curvature(changed, shortened(tokens), device, gradients=priced)
    parts = None
    if options.cap is not None:
        parts = _parts(changed, options, tokens, statistics, device)
    return Groundwork(
        dense,
        changed,
        options,
        statistics,
        table,
        tokens,
        selection,
        parts,
        choice.findings,
        (diagonals_finding(changed),) if only_diagonals(changed, options) else (),
        dense_logits,
    )


def _parts(
    source: Source,
    options: CompressOptions,
    tokens: Tensor,
    statistics: DenseStatistics,
    device: torch.device,
) -> dict[Place, Parts]:
    if options.cap is None or options.budget is None:
        raise ValueError("no low rank and sparse parts were asked for")
    return cap_parts(
        source,
        sparse_budget(source, options),
        options.cap,
        tokens=tokens,
        statistics=statistics,
        device=device,
        prices=stored_prices(options),
    )


def _weighs_errors(options: CompressOptions) -> bool:
    """Whether anything that was asked for weighs errors by statistics."""
    rounds = options.quant is not None or options.embedding_quant is not None
    return bool(
        options.budget
        or options.rank
        or options.groups
        or options.heal
        or (rounds and options.quantizer != "rtn")
    )


def _left_out(source: Source, options: CompressOptions) -> Iterator[Finding]:
    """Yield what a model without calibration text goes without."""
    if options.calibration.uses_text and source.architecture.is_encoder and _weighs_errors(options):
        reason = (
            f"{options.calibration.metric} was asked for, but an encoder has no loss: all errors weigh alike"
        )
        yield Finding("metric", Outcome.SKIPPED, reason)
    if "scale" in options.preparations:
        yield Finding(
            "prepare.scale", Outcome.SKIPPED, "without calibration text there are no peaks to even out"
        )
