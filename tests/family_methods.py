"""Everything that can be asked for of a model, as small recipes, and what each gives on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from compressed import INT4, floats
from torch import Tensor

from rk_export.commands.checks import check_options
from rk_export.commands.compression_inputs import CompressionInputs, compression_inputs
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.sslc.options import SslcOptions
from rk_export.model.layer_wiring import wiring_of
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.prepare import PREPARATIONS
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.texts import TextFile
from rk_export.plan import Plan
from rk_export.planning.planner import decide_plan
from rk_export.report.records import Outcome
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.source.prepared import Prepared
from rk_export.source.stored import StoredModel

_TEXT = CalibrationOptions("self", tokens=512)
_HALF: dict[str, Any] = {"rank": RankRule("keep", 0.6), "rank_multiple": 8}
INT8 = QuantSpec(8, 16)

# Each from the text of a task, which only one of them reads.
RECIPES: Mapping[str, Callable[[Path], Recipe]] = MappingProxyType(
    {
        "rank": lambda text: floats(None, **_HALF),
        "identity": lambda text: floats(None, form="identity", **_HALF),
        "per-head QK": lambda text: floats(("qk",), qk="per-head", **_HALF),
        "INT4": lambda text: floats(quant=INT4, table=INT8),
        "rank and INT4": lambda text: floats(None, quant=INT4, table=INT8, **_HALF),
        "W8A8": lambda text: floats(quant=W8A8),
        "prune blocks": lambda text: _method(PruneOptions(blocks=1)),
        "prune neurons": lambda text: _method(PruneOptions(ffn_keep=0.75)),
        "prune heads": lambda text: _method(PruneOptions(kv_heads_keep=1)),
        "CAP": lambda text: _method(CapOptions(keep=0.6, steps=3, batch_tokens=256)),
        "Basel": lambda text: _method(
            BaselOptions(
                TextFile.of(text),
                keep=0.6,
                steps=4,
                events=2,
                batch_tokens=64,
                new_basis=4,
                learning_rate=1e-3,
            )
        ),
        "SSLC": lambda text: _method(SslcOptions(keep=0.6)),
    }
)
# Each leaves the logits of the untouched model.
PREPARED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fold": ("fold",),
        "fold, rotate": ("fold", "rotate"),
        "rotate-heads": ("rotate-heads",),
        "scale": ("scale",),
        "all": PREPARATIONS,
    }
)


def prepared(source: StoredModel, names: tuple[str, ...]) -> tuple[Rewritten, dict[str, str]]:
    """Return a model under preparations, otherwise in floats, and why some of them were left out."""
    new = source.then(Prepared(source.description, names, peaks=_peaks(source), alpha=0.5))
    taken = new.transforms[0].names
    left_out = {
        finding.target: finding.reason
        for finding in new.findings
        if finding.target.startswith("prepare.") and finding.outcome is not Outcome.APPLIED
    }
    return rewrite(new, decide_plan(new, floats(prepare=taken))), left_out


def _peaks(source: StoredModel) -> dict[str, Tensor]:
    """Return random peaks of the neurons of every down matrix, some of them silent; an encoder is not prepared."""
    if source.architecture.is_encoder:
        return {}
    generator = torch.Generator().manual_seed(5)
    shapes = {(matrix.id.layer, matrix.id.path): matrix.shape for matrix in source.description.matrices}
    peaks = {}
    for index in range(source.layer_count):
        for _, down in wiring_of(source.description, index).mlps:
            drawn = torch.randn(shapes[index, down][1], generator=generator).mul(2).exp()
            drawn[::7] = 0.0
            peaks[f"layers.{index}.{down}"] = drawn
    return peaks


def _method(method: Any) -> Recipe:
    return floats(prepare=(), methods=(method,), calibration=_TEXT)


def carried_out(source: StoredModel, recipe: Recipe) -> Rewritten:
    """Return a model under a recipe, as the commands make it.

    Raises:
        RkExportError: As they refuse it.
    """
    check_options(source, recipe)
    inputs = compression_inputs(source, recipe)
    decision = inputs.decision
    plan = _planned(inputs) if decision is None else decision.plan(inputs.source, inputs.recipe)
    return inputs.rewrite(replace(plan, pruning=inputs.source.pruning))


def _planned(inputs: CompressionInputs) -> Plan:
    return decide_plan(inputs.source, inputs.recipe, statistics=inputs.statistics, table=inputs.table)
