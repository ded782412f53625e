"""What compression starts from: the dense model under exact reparameterizations, calibration text, statistics.

All of it depends on the model and on the options alone, and what is costly is kept on disk: applying the same
plan to the same model again, as `verify` does, finds it there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.architectures import Architecture
from rk_export.calibration import calibration_tokens
from rk_export.dense_statistics import DenseStatistics, layerwise
from rk_export.device import resolve_device
from rk_export.humanize import size
from rk_export.layer_statistics import FromDense, FromGains, FromPrefix, LayerStatistics, NoStatistics
from rk_export.load import ModelSource
from rk_export.moments import inputs_of
from rk_export.options import CompressOptions
from rk_export.passes.numerics.predicted_loss import TableCurvature
from rk_export.plan import Plan
from rk_export.planner import canonical_layers
from rk_export.prepared import PreparedSource
from rk_export.report import Finding, Outcome
from rk_export.rewrite import Rewritten, rewrite
from rk_export.sensitivity import dense_statistics
from rk_export.table_statistics import table_curvature

logger = logging.getLogger(__name__)

# The peaks that even out FFN neurons, and the embedding's few numbers, settle with less text.
SHORT_TEXT = 2048
# How far the peaks are evened out. SmolLM2 with int8 inputs, all linear layers: perplexity 22.84, 22.54 and 22.59 at
# 0, 0.25 and 0.5.
SCALE_ALPHA = 0.25
# Bytes; beyond them only the diagonals of the gradients' moments are kept.
GRADIENT_LIMIT = 8_000_000_000


@dataclass(frozen=True)
class Groundwork:
    """The start of a compression.

    Args:
        source: The dense model, reparameterized as the options ask.
        statistics: Of that model; None where the metric uses no text, or the model is an encoder.
        table: What errors of the embedding cost; None like the statistics.
        tokens: The calibration text, int64 (sequences, length); None where the metric uses none.
        left_out: What was asked for and could not be had, with the reason.
    """

    source: ModelSource
    options: CompressOptions
    statistics: DenseStatistics | None = None
    table: TableCurvature | None = None
    tokens: Tensor | None = None
    left_out: tuple[Finding, ...] = ()

    def rewrite(self, plan: Plan, probe: Tensor | None = None) -> Rewritten:
        """Apply a plan to the model, under what is known about it."""
        table = None if self.table is None else self.table.inputs
        rewritten = rewrite(
            self.source, plan, statistics=self.layer_statistics(), table_inputs=table, probe=probe
        )
        return replace(rewritten, findings=(*self.findings, *rewritten.findings))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was reparameterized and what was not, and what else was left out."""
        prepared = self.source.findings if isinstance(self.source, PreparedSource) else ()
        return (*prepared, *self.left_out)

    def layer_statistics(self) -> LayerStatistics:
        """Return where the statistics of the layers' sites come from."""
        calibration, architecture = self.options.calibration, self.source.architecture
        if calibration.metric == "gain":
            return FromGains(architecture)
        if self.statistics is None or self.tokens is None:
            return NoStatistics()
        dense = FromDense(self.statistics)
        return FromPrefix(dense, self.tokens, architecture) if calibration.prefix else dense


def groundwork(source: ModelSource, options: CompressOptions) -> Groundwork:
    """Reparameterize a model and gather what the options need to know about it.

    Raises:
        InputError: If the calibration text cannot be read or written by the model, or the preparations do not go
            together.
    """
    device = resolve_device(options.device)
    if not options.calibration.uses_text or source.architecture.is_encoder or not _weighs_errors(options):
        names = tuple(name for name in options.preparations if name != "scale")
        prepared = _prepared(source, options, names, {})
        return Groundwork(prepared, options, left_out=tuple(_left_out(source, options)))
    tokens = calibration_tokens(source, options.calibration, device)
    peaks = {}
    if "scale" in options.preparations:
        logger.info("peaks of the FFN neurons on %d tokens", SHORT_TEXT)
        peaks = neuron_peaks(source, _first(tokens, SHORT_TEXT), device)
    prepared = _prepared(source, options, options.preparations, peaks)
    model, architecture = prepared.load(), source.architecture
    diagonal = options.calibration.gradients and gradient_bytes(source) > GRADIENT_LIMIT
    statistics = _statistics(model, architecture, tokens, options, diagonal=diagonal)
    table = table_curvature(model, architecture, _first(tokens, SHORT_TEXT), device)
    left_out = (_diagonal_only(source),) if diagonal else ()
    return Groundwork(prepared, options, statistics, table, tokens, left_out)


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


def _statistics(
    model: PreTrainedModel,
    architecture: Architecture,
    tokens: Tensor,
    options: CompressOptions,
    *,
    diagonal: bool,
) -> DenseStatistics:
    device, wanted = resolve_device(options.device), options.calibration.gradients
    statistics = dense_statistics(
        model,
        architecture,
        tokens,
        diagonal=diagonal or not wanted,
        device=device,
        gradient_tokens=tokens.numel() // 2 if wanted else 0,
    )
    if wanted:
        return statistics
    logger.info("outputs weigh by relative error, layer by layer")
    layers = list(model.get_submodule(architecture.layers).children())
    weights = {
        (layer, path): layers[layer].get_submodule(path).weight for layer, path in statistics.gradients
    }
    return layerwise(statistics, weights)


def _left_out(source: ModelSource, options: CompressOptions) -> Iterator[Finding]:
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


def _diagonal_only(source: ModelSource) -> Finding:
    needed = size(gradient_bytes(source))
    return Finding("metric", Outcome.SKIPPED, f"gradients by their diagonals: whole ones take {needed}")


def _prepared(
    source: ModelSource, options: CompressOptions, names: Sequence[str], peaks: Mapping[str, Tensor]
) -> ModelSource:
    if not names:
        return source
    return PreparedSource(source, names, seed=options.calibration.seed, peaks=peaks, alpha=SCALE_ALPHA)


def _first(tokens: Tensor, count: int) -> Tensor:
    return tokens[: max(1, count // tokens.shape[1])]


def gradient_bytes(source: ModelSource) -> int:
    """Return the bytes of the whole second moments of all output gradients, float32."""
    return 4 * sum(
        layer.linear(item.path).out_features ** 2
        for layer in canonical_layers(source.config)
        for item in source.architecture.projections(source.config, layer.index)
    )


@torch.no_grad()
def neuron_peaks(source: ModelSource, tokens: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return the largest absolute input of each FFN neuron's column: name of the down matrix -> (neurons,)."""
    model, peaks = source.load().to(device), dict[str, Tensor]()
    names = [
        f"layers.{layer}.{item.path}"
        for layer in range(source.layer_count)
        for item in source.architecture.projections(source.config, layer)
        if item.role == "down" or (item.role == "expert" and item.path.endswith("down_proj"))
    ]
    root = source.architecture.layers.rpartition("layers")[0]
    modules = {name: model.get_submodule(root + name) for name in names}
    for ids in torch.split(tokens, max(1, SHORT_TEXT // tokens.shape[1])):
        with inputs_of(modules) as inputs:
            model(input_ids=ids.to(device), use_cache=False)
        for name, x in inputs.items():
            peak = x.flatten(0, -2).abs().amax(0).float().cpu()
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)
    return peaks
