"""Apply a plan to a model: each decoder layer is loaded, factorized and quantized in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.layer_statistics import LayerStatistics, NoStatistics
from rk_export.calibration.streams import Streams
from rk_export.device import CPU
from rk_export.matrix_id import MatrixId
from rk_export.model.description import ModelDescription
from rk_export.model.families import Architecture
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
) -> Rewritten:
    """Load a model layer by layer and apply a plan to it.

    Args:
        source: The dense model.
        plan: What to do to each site.
        statistics: Of each layer's sites; None weighs all inputs and outputs alike.
        table_inputs: What the output projection reads, to quantize it under its moment.
        parts: Low rank and sparse parts of the matrices whose sites have the sparse form.
        probe: Tokens (batch, length) that run through the dense, factorized and quantized layers alongside,
            for the parity tiers and the per-layer errors; None skips that.
        device: Where matrices are factorized and quantized.

    Raises:
        InputError: If the plan belongs to another model, or a tensor is missing or not finite.
    """
    check_plan(source, plan)
    options, architecture = plan.recipe, source.architecture
    statistics = statistics or NoStatistics()
    quantize = Quantize(SCALE_DTYPE, device, options.quantizer)
    model = source.skeleton()
    source.load_rest(model)
    carried = _Carried(model, architecture, probe)
    carried.start(DENSE)
    statistics.begin(model)
    findings: list[Finding] = list(head_findings(source, options))
    if plan.table is not None and not architecture.is_encoder:
        findings += quantize_embedding(
            model,
            architecture.embedding,
            architecture.lm_head,
            plan.table,
            quantize,
            table_inputs,
        )
    carried.start(QUANTIZED)
    statistics.embedded()
    carry = Carry(source_grids(source), options.target.float_dtype)
    passes = _LayerPasses(plan, dict(architecture.mlp), carry, quantize, parts or {})
    kv_groups = source.description.heads.kv_heads
    for index in track(range(source.layer_count), "rewriting layers"):
        layer = Layer(index, source.load_layer(model, index), kv_groups)
        carried.advance(DENSE, index)
        findings += passes.factorize(layer, statistics.of_sites(layer, plan.of_layer(index)))
        carried.advance(FACTORIZED, index)
        findings += passes.quantize()
        carried.advance(QUANTIZED, index)
        statistics.rewritten(index)
    return Rewritten(
        model,
        source.description,
        plan,
        tuple(findings),
        passes.spectra,
        tuple(carried.errors),
        carried.logits(),
    )


class _LayerPasses:
    """The weight passes on one layer after the other, in two steps: what changes matrices, then what rounds them.

    Args:
        plan: What to do.
        mlp: Path of each of the MLP's matrices by role.
        carry: Takes the source's own codes over.
        quantize: The weight-only quantization.
        parts: Of the matrices in the sparse form.
    """

    def __init__(
        self,
        plan: Plan,
        mlp: dict[str, str],
        carry: Carry,
        quantize: Quantize,
        parts: Mapping[MatrixId, Parts],
    ) -> None:
        self._plan, self._device = plan, quantize.device
        self._joint = Factorize(plan.recipe.gauge, self._device, mlp)
        self._sparse = Sparse(parts)
        self._rounding: tuple[WeightPass, ...] = (carry, quantize, Int8(self._device))
        self._layer: Layer | None = None
        self._known: dict[str, Curvature] = {}

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """Spectra of what was factorized so far."""
        return tuple(self._joint.spectra)

    def factorize(self, layer: Layer, known: dict[str, Curvature]) -> list[Finding]:
        """Reshape and factorize a dense layer."""
        sites = self._plan.of_layer(layer.index)
        layer, reshaped = reshape_layer(layer, self._plan.shape_of(layer.index), sites, known, self._device)
        # The statistics are those of the whole layer: what is left of it is judged by its weights.
        self._layer, self._known = layer, {} if reshaped else known
        return [
            *_stayed_dense(sites),
            *reshaped,
            *run_weight_pass(self._joint, layer, sites, self._known),
            *run_weight_pass(self._sparse, layer, sites, self._known),
        ]

    def quantize(self) -> list[Finding]:
        """Round the layer that was factorized last."""
        if self._layer is None:
            raise RuntimeError("`factorize` comes first")
        sites = self._plan.of_layer(self._layer.index)
        # The identity form may have renumbered the FFN's neurons.
        aligned = {
            site.site: curvature
            for site in sites
            if (curvature := self._joint.aligned(site, self._known.get(site.site))) is not None
        }
        return [
            finding
            for weight_pass in self._rounding
            for finding in run_weight_pass(weight_pass, self._layer, sites, aligned)
        ]


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

    def advance(self, version: str, index: int) -> None:
        """Run a version through a layer as it is now; the last version notes the layer's errors."""
        if self._streams is None:
            return
        self._streams.advance(version, index)
        if version == QUANTIZED:
            self.errors.append(_layer_error(index, self._streams))

    def logits(self) -> dict[str, Tensor]:
        """Return the logits of every version."""
        if self._streams is None:
            return {}
        quantized = self._modules()
        logits = {QUANTIZED: self._streams.finish(QUANTIZED)}
        self._set_outer(self._dense_outer)
        logits |= {version: self._streams.finish(version) for version in (DENSE, FACTORIZED)}
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
