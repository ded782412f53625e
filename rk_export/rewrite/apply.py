"""Apply a plan to a model: each decoder layer is loaded, factorized and quantized in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.layer_statistics import LayerStatistics, NoStatistics
from rk_export.calibration.streams import Streams
from rk_export.device import CPU
from rk_export.matrix_id import MatrixId
from rk_export.memory import give_back
from rk_export.model.architecture import Architecture
from rk_export.model.description import ModelDescription
from rk_export.passes.base import Layer, WeightPass, run_weight_pass
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.weights.carry import Carry
from rk_export.passes.weights.embedding import quantize_embedding
from rk_export.passes.weights.factorize import Factorize
from rk_export.passes.weights.int8 import Int8
from rk_export.passes.weights.quantize import Quantize
from rk_export.passes.weights.shapes import reshape_layer
from rk_export.passes.weights.sparse import Sparse
from rk_export.plan import Plan, SitePlan
from rk_export.planning.carried import head_findings, source_grids
from rk_export.planning.planner import check_plan
from rk_export.progress import track
from rk_export.report.records import Finding, LayerError, Outcome, Spectrum
from rk_export.rewrite.empty_layers import changes_before_rounding, empty_layer, empty_tables
from rk_export.rewrite.layer_store import TABLES, FinishedLayer, LayerStore, filled
from rk_export.rewrite.tables import fill_tables, tensors_of_tables
from rk_export.scratch import laid_down, settle
from rk_export.source.protocol import Source

DENSE, FACTORIZED, QUANTIZED = "dense", "factorized", "quantized"
# In fp32 graphs too: the runtime widens stored scales once, when it loads the graph.
SCALE_DTYPE = torch.float16


@dataclass(frozen=True)
class Rewritten:
    """A compressed PyTorch model and what it took.

    Args:
        model: The model in canonical form; it evaluates, saves and exports.
        description: Of the model.
        plan: The plan that was applied.
        findings: One per pass and site, and one per site that stayed dense though asked for.
        spectra: Spectra of the factorized matrices.
        layer_errors: Relative error of each layer's output on the probe, against the dense model.
        probe_logits: Logits of the probe (batch, length, vocab) by version: dense, factorized, quantized.
    """

    model: PreTrainedModel
    description: ModelDescription
    plan: Plan
    findings: tuple[Finding, ...]
    spectra: tuple[Spectrum, ...] = ()
    layer_errors: tuple[LayerError, ...] = ()
    probe_logits: dict[str, Tensor] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        """The model's family."""
        return self.description.architecture


def rewrite(
    source: Source,
    plan: Plan,
    *,
    statistics: LayerStatistics | None = None,
    table_inputs: Inputs | None = None,
    parts: Mapping[MatrixId, Parts] | None = None,
    probe: Tensor | None = None,
    device: torch.device = CPU,
    store: LayerStore | None = None,
    folder: Path | None = None,
) -> Rewritten:
    """Load a model layer by layer and apply a plan to it; a finished layer is on disk, mapped.

    Args:
        source: The dense model.
        plan: What to do to each site.
        statistics: Of each layer's sites; None weighs all inputs and outputs alike.
        table_inputs: What the output projection reads, to quantize it under its moment.
        parts: Low rank and sparse parts of the matrices whose sites have the sparse form.
        probe: Tokens (batch, length) that run through the dense, factorized and quantized layers alongside,
            for the parity tiers and the per-layer errors; None skips that.
        device: Where matrices are factorized and quantized.
        store: Finished layers of this very run: those that are there are taken, the others are kept there.
        folder: Whose disk takes finished layers without a store, as in `mapped`.

    Raises:
        InputError: If the plan belongs to another model, or a tensor is missing or not finite.
    """
    check_plan(source, plan)
    architecture = source.architecture
    statistics = statistics or NoStatistics()
    model = source.skeleton()
    source.load_rest(model)
    carried = _Carried(model, architecture, probe)
    carried.start(DENSE)
    statistics.begin(model)
    findings: list[Finding] = list(head_findings(source, plan.recipe))
    findings += _finished_tables(model, source, plan, table_inputs, device, store)
    for path in source.description.outer_paths:
        settle(model.get_submodule(path), folder)
    give_back()
    carried.start(QUANTIZED)
    statistics.embedded()
    layers = cast(nn.ModuleList, model.get_submodule(architecture.layers))
    spectra: list[Spectrum] = []
    for index in track(range(source.layer_count), "rewriting layers"):
        layer = Layer(index, source.load_layer(model, index), source.description.heads.kv_heads)
        changes = changes_before_rounding(plan, index)
        carried.advance_dense(index, as_factorized=not changes)
        finished = None if store is None else store.find(index)
        if finished is None:
            known = statistics.of_sites(layer, plan.of_layer(index))
            finished = finished_layer(source, plan, layer, known, parts or {}, device)
            if store is not None:
                store.keep(index, finished)
                finished = store.find(index) or finished
        else:
            statistics.pass_by(layer, plan.of_layer(index))
        if changes:
            empty = empty_layer(source.description, plan, index, rounded=False)
            layers[index] = filled(empty.module, finished.unrounded)
            carried.advance(FACTORIZED, index)
        layers[index] = filled(empty_layer(source.description, plan, index).module, finished.tensors)
        if store is None:
            settle(layers[index], folder)
        carried.advance(QUANTIZED, index)
        statistics.rewritten(index)
        give_back()
        findings += finished.findings
        spectra += finished.spectra
    return Rewritten(
        model,
        source.description,
        plan,
        tuple(findings),
        tuple(spectra),
        tuple(carried.errors),
        carried.logits(),
    )


def _finished_tables(
    model: PreTrainedModel,
    source: Source,
    plan: Plan,
    inputs: Inputs | None,
    device: torch.device,
    store: LayerStore | None,
) -> tuple[Finding, ...]:
    """Quantize the embedding and the output projection of a model in place, or take those of the store."""
    architecture, spec = source.architecture, plan.table
    if spec is None:
        return ()
    finished = None if store is None else store.find(TABLES)
    if finished is not None:
        empty_tables(model, architecture, spec)
        fill_tables(model, architecture, finished.tensors)
        return finished.findings
    quantize = Quantize(SCALE_DTYPE, device, plan.recipe.quantizer)
    paths = architecture.embedding, architecture.lm_head
    findings = tuple(quantize_embedding(model, *paths, spec, quantize, inputs))
    if store is not None:
        store.keep(TABLES, FinishedLayer(tensors_of_tables(model, architecture), findings=findings))
    return findings


def finished_layer(
    source: Source,
    plan: Plan,
    layer: Layer,
    known: Mapping[str, Curvature],
    parts: Mapping[MatrixId, Parts],
    device: torch.device,
) -> FinishedLayer:
    """Apply a plan to one dense layer, which is changed in place: first what changes matrices, then what rounds them.

    Args:
        source: The dense model that the layer is of.
        plan: What to do.
        layer: The layer, with its weights.
        known: Curvatures by site name, those of experts by matrix; what has none is judged by its weights.
        parts: Of the matrices in the sparse form.
        device: Where matrices are factorized and quantized.
    """
    sites = plan.of_layer(layer.index)
    joint = Factorize(plan.recipe.gauge, device, _mlp_paths(source.description, layer.index))
    layer, reshaped = reshape_layer(layer, plan.shape_of(layer.index), sites, known, device)
    # The statistics are those of the whole layer: what is left of it is judged by its weights.
    known = {} if reshaped else known
    findings = [
        *_stayed_dense(sites),
        *reshaped,
        *run_weight_pass(joint, layer, sites, known),
        *run_weight_pass(Sparse(parts), layer, sites, known),
    ]
    changes = changes_before_rounding(plan, layer.index)
    unrounded = layer.module.state_dict() if changes else {}
    # The identity form may have renumbered the FFN's neurons.
    aligned = {
        site.site: curvature
        for site in sites
        if (curvature := joint.aligned(site, known.get(site.site))) is not None
    }
    rounding: tuple[WeightPass, ...] = (
        Carry(source_grids(source), plan.recipe.target.float_dtype),
        Quantize(SCALE_DTYPE, device, plan.recipe.quantizer, known),
        Int8(device),
    )
    for weight_pass in rounding:
        findings += run_weight_pass(weight_pass, layer, sites, aligned)
    return FinishedLayer(layer.module.state_dict(), unrounded, tuple(findings), tuple(joint.spectra))


def _mlp_paths(description: ModelDescription, layer: int) -> dict[str, str]:
    """Return the path of each matrix of a layer's MLP by role; of a mixture's the one that every token runs through."""
    roles = ("gate", "up", "down")
    return {item.role: item.path for item in description.projections(layer) if item.role in roles}


class _Carried:
    """Probe tokens carried through three versions of the model while it is rewritten; nothing without a probe.

    The factorized version shares the dense one's embedding and head, so those are kept until its logits are read.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, probe: Tensor | None) -> None:
        self.errors: list[LayerError] = []
        self._model = model
        self._outer = [path for path in (architecture.embedding, architecture.lm_head) if path]
        self._dense_outer = self._modules()
        layers = model.get_submodule(architecture.layers)
        if not isinstance(layers, nn.ModuleList):
            raise TypeError(f"{architecture.layers} is no list of layers")
        self._streams = None if probe is None else Streams(model, layers, probe)

    def start(self, version: str) -> None:
        """Begin a version with the embedding as it is now; the dense one begins the factorized one too."""
        if self._streams is None:
            return
        self._streams.start(version)
        if version == DENSE:
            self._streams.hidden[FACTORIZED] = self._streams.hidden[DENSE]

    def advance_dense(self, index: int, *, as_factorized: bool) -> None:
        """Run the dense version through a layer that is still dense, and with it the factorized one if it stays so."""
        if self._streams is None:
            return
        hidden = self._streams.hidden
        same = hidden[FACTORIZED] is hidden[DENSE]
        if as_factorized and not same:
            self._streams.advance(FACTORIZED, index)
        self._streams.advance(DENSE, index)
        if as_factorized and same:
            hidden[FACTORIZED] = hidden[DENSE]

    def advance(self, version: str, index: int) -> None:
        """Run a version through a layer as it is now; the last version notes the layer's errors."""
        if self._streams is None:
            return
        self._streams.advance(version, index)
        if version == QUANTIZED:
            self.errors.append(_layer_error(index, self._streams))

    def logits(self) -> dict[str, Tensor]:
        """Return the logits of every version, mapped."""
        if self._streams is None:
            return {}
        quantized, hidden = self._modules(), self._streams.hidden
        logits = {QUANTIZED: laid_down(self._streams.finish(QUANTIZED))}
        self._set_outer(self._dense_outer)
        logits[DENSE] = logits[FACTORIZED] = laid_down(self._streams.finish(DENSE))
        if hidden[FACTORIZED] is not hidden[DENSE]:
            logits[FACTORIZED] = laid_down(self._streams.finish(FACTORIZED))
        self._set_outer(quantized)
        return logits

    def _modules(self) -> dict[str, nn.Module]:
        return {path: self._model.get_submodule(path) for path in self._outer}

    def _set_outer(self, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            self._model.set_submodule(path, module)


def _stayed_dense(sites: tuple[SitePlan, ...]) -> list[Finding]:
    return [Finding(site.site, Outcome.SKIPPED, reason=site.reason) for site in sites if site.reason]


def _layer_error(index: int, streams: Streams) -> LayerError:
    dense = streams.hidden[DENSE]
    norm = float(dense.norm())
    return LayerError(
        layer=index,
        factorized=float((streams.hidden[FACTORIZED] - dense).norm()) / norm,
        quantized=float((streams.hidden[QUANTIZED] - dense).norm()) / norm,
    )
