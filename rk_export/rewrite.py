"""Apply a plan to a model: each decoder layer is loaded, factorized and quantized in turn."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.architectures import Architecture
from rk_export.errors import InputError, ProviderError
from rk_export.load import ModelSource
from rk_export.passes.base import Layer, run_weight_pass
from rk_export.passes.weights.embedding import quantize_embedding
from rk_export.passes.weights.joint_rank import JointRank
from rk_export.passes.weights.quantize import Quantize
from rk_export.plan import Plan, SitePlan
from rk_export.planner import check_plan
from rk_export.report import Finding, LayerError, Outcome, Spectrum
from rk_export.streams import Streams

logger = logging.getLogger(__name__)

DENSE, FACTORIZED, QUANTIZED = "dense", "factorized", "quantized"
SCALE_DTYPE = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Rewritten:
    """A compressed PyTorch model and what it took.

    Args:
        model: The model in canonical form; it evaluates, saves and exports.
        architecture: Its family.
        plan: The plan that was applied.
        findings: One per pass and site, and one per site that stayed dense though asked for.
        spectra: Spectra of the factorized matrices.
        layer_errors: Relative error of each layer's output on the probe, against the dense model.
        probe_logits: Logits of the probe (batch, length, vocab) by version: dense, factorized, quantized.
    """

    model: PreTrainedModel
    architecture: Architecture
    plan: Plan
    findings: tuple[Finding, ...]
    spectra: tuple[Spectrum, ...] = ()
    layer_errors: tuple[LayerError, ...] = ()
    probe_logits: dict[str, Tensor] = field(default_factory=dict)


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises:
        ProviderError: If CUDA was asked for and PyTorch cannot use it.
        InputError: If the name is none of these.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}", where="--device", fix="choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ProviderError(
            "PyTorch sees no CUDA device",
            where="--device",
            fix="use --device auto, or run `rk-export doctor`",
        )
    return device


def rewrite(source: ModelSource, plan: Plan, *, probe: Tensor | None = None) -> Rewritten:
    """Load a model layer by layer and apply a plan to it.

    Args:
        source: The dense model.
        plan: What to do to each site.
        probe: Tokens (batch, length) that run through the dense, factorized and quantized layers alongside,
            for the parity tiers and the per-layer errors; None skips that.

    Raises:
        InputError: If the plan belongs to another model, or a tensor is missing or not finite.
    """
    check_plan(source, plan)
    options = plan.options
    device = resolve_device(options.device)
    joint = JointRank(options.gauge, device)
    quantize = Quantize(SCALE_DTYPE[options.float_dtype], device)

    model = source.skeleton()
    source.load_rest(model)
    architecture, layers = source.architecture, model.get_submodule(source.architecture.layers)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{architecture.layers} is no list of layers")
    kv_groups = architecture.heads(source.config).kv_heads

    streams = None if probe is None else Streams(model, layers, probe)
    dense_outer = _outer(model, architecture)
    if streams is not None:
        streams.start(DENSE)
        streams.hidden[FACTORIZED] = streams.hidden[DENSE]
    findings: list[Finding] = []
    if options.embedding_quant is not None and not architecture.is_encoder:
        findings += quantize_embedding(
            model, architecture.embedding, architecture.lm_head, options.embedding_quant, quantize
        )
    if streams is not None:
        streams.start(QUANTIZED)

    errors: list[LayerError] = []
    for index in range(source.layer_count):
        logger.info("layer %d of %d", index + 1, source.layer_count)
        layer = Layer(index, source.load_layer(model, index), kv_groups)
        sites = plan.of_layer(index)
        findings += _stayed_dense(sites)
        if streams is not None:
            streams.advance(DENSE, index)
        findings += run_weight_pass(joint, layer, sites)
        if streams is not None:
            streams.advance(FACTORIZED, index)
        findings += run_weight_pass(quantize, layer, sites)
        if streams is not None:
            streams.advance(QUANTIZED, index)
            errors.append(_layer_error(index, streams))

    logits = {}
    if streams is not None:
        logits[QUANTIZED] = streams.finish(QUANTIZED)
        quantized_outer = _outer(model, architecture)
        _put_outer(model, architecture, dense_outer)
        logits |= {version: streams.finish(version) for version in (DENSE, FACTORIZED)}
        _put_outer(model, architecture, quantized_outer)
    return Rewritten(model, architecture, plan, tuple(findings), tuple(joint.spectra), tuple(errors), logits)


def _outer(model: PreTrainedModel, architecture: Architecture) -> dict[str, nn.Module]:
    paths = [architecture.embedding] + ([architecture.lm_head] if architecture.lm_head else [])
    return {path: model.get_submodule(path) for path in paths}


def _put_outer(model: PreTrainedModel, architecture: Architecture, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        model.set_submodule(path, module)


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
