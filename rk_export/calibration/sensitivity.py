"""Passes over the dense model: what its matrices read, and how the loss feels what they put out.

With labels drawn from the model's own distribution the outer products of gradients average to the Fisher
information, which is the Hessian of the Kullback-Leibler divergence from the dense model at the dense weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.moments import MomentSum
from rk_export.calibration.recorders import GradientRecorder, InputRecorder, recording
from rk_export.calibration.self_text import draw
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.model.families import Architecture
from rk_export.progress import track
from rk_export.report.humanize import size
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cache_file, read_tensors, text_key, write_tensors

logger = logging.getLogger(__name__)

CHUNK, GRADIENT_CHUNK = 2048, 512  # tokens that run together, forward only and forward and back
GRADIENT_TOKENS = 4096
CACHE_LIMIT = 2_000_000_000  # bytes; larger statistics are not kept on disk
_VERSION = 2

Labels = Literal["model", "text"]


@dataclass(frozen=True)
class _Passes:
    """How text runs through the dense model; the fields are those of `dense_statistics`."""

    diagonal: bool
    gradient_tokens: int
    labels: Labels
    seed: int
    dtype: torch.dtype

    def key(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": str(self.dtype), "version": _VERSION}


def dense_statistics(
    source: Source,
    tokens: Tensor,
    *,
    diagonal: bool,
    device: torch.device,
    gradient_tokens: int = GRADIENT_TOKENS,
    labels: Labels = "model",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> DenseStatistics:
    """Gather statistics of a dense decoder on a text, or read those of an earlier run.

    They are kept on disk by the model's files and what was done to it, unless they take more than `CACHE_LIMIT`
    bytes; what an earlier run left there is found without loading the model.

    Args:
        source: The dense model.
        tokens: Calibration text, int64 (sequences, length), without padding.
        diagonal: Keep the diagonals of the gradients' moments only, which costs next to nothing.
        device: Where the passes run.
        gradient_tokens: How many of the first tokens run back too, in whole sequences and at least one; the
            others run forward only. 0 runs none back: the statistics then hold no gradients.
        labels: `model` draws the tokens to predict from the model's distribution (the Fisher information), `text`
            takes the text's own (the empirical one).
        seed: Of the drawn labels.
        dtype: What matrices multiply in, float32 or bfloat16; None takes `matmul_dtype` of the device.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.

    Raises:
        InputError: If the model is an encoder, which predicts no next token, or its logits are not finite.
    """
    _check_decoder(source.architecture)
    passes = _Passes(diagonal, gradient_tokens, labels, seed, dtype or matmul_dtype(device))
    key = {**passes.key(), **text_key(tokens), "model": source.fingerprint(cache_dir)}
    path = cache_file("dense-statistics", key, cache_dir)
    if (known := read_tensors(path)) is not None:
        return DenseStatistics.from_tensors(known)
    model, architecture = source.shared(), source.architecture
    modules = _matrices(model, architecture, device)
    inputs, gradients = InputRecorder(), GradientRecorder(diagonal=diagonal)
    sequences = max(1, gradient_tokens // tokens.shape[1]) if gradient_tokens else 0
    predicted, embedded = 0, MomentSum(diagonal=True)
    if sequences:
        with recording(modules, inputs.record, gradients.record):
            predicted = _run_back(model, architecture, tokens[:sequences], passes, embedded)
    with recording(modules, inputs.record):
        _run_forward(model, tokens[sequences:], passes)
    statistics = DenseStatistics(
        inputs.second(),
        inputs.peaks(),
        inputs.token_peaks(),
        gradients.moments(predicted),
        predicted or tokens.numel(),
        embedded.mean() if sequences else None,
    )
    _keep(path, statistics.to_tensors())
    return statistics


def output_weights(
    model: PreTrainedModel, architecture: Architecture, tokens: Tensor, device: torch.device
) -> dict[MatrixId, Tensor]:
    """Return the mean over tokens of the squared gradient of a token's loss by what each matrix puts out, (out,).

    Args:
        model: The dense model in canonical form; its parameters are frozen and moved to `device`.
        architecture: Its family.
        tokens: Text, int64 (sequences, length); labels are drawn from the model's distribution.
        device: Where the passes run.

    Raises:
        InputError: If the model is an encoder, or its logits are not finite.
    """
    _check_decoder(architecture)
    modules = _matrices(model, architecture, device)
    gradients = GradientRecorder(diagonal=True)
    with recording(modules, gradients.record):
        passes = _Passes(True, tokens.numel(), "model", 0, matmul_dtype(device))
        predicted = _run_back(model, architecture, tokens, passes, MomentSum(diagonal=True))
    return {place: moment * predicted for place, moment in gradients.moments(predicted).items()}


def _matrices(
    model: PreTrainedModel, architecture: Architecture, device: torch.device
) -> dict[MatrixId, nn.Module]:
    """Freeze and move a model and return its matrices."""
    model.requires_grad_(False).to(device)
    return {
        MatrixId(index, item.path): layer.get_submodule(item.path)
        for index, layer in enumerate(model.get_submodule(architecture.layers).children())
        for item in architecture.projections(model.config, index)
    }


def _check_decoder(architecture: Architecture) -> None:
    """Refuse an encoder, whose loss has no gradients."""
    if architecture.is_encoder:
        raise InputError(
            f"{architecture.model_type} is an encoder: it predicts no next token, so its loss has no gradients",
            where="sensitivities",
            fix="plan without gradients",
        )


@torch.no_grad()
def _run_forward(model: PreTrainedModel, tokens: Tensor, passes: _Passes) -> None:
    """Run text through the layers."""
    device = model.device
    if not len(tokens):
        return
    for ids in track(
        torch.split(tokens, max(1, CHUNK // tokens.shape[1])), "inputs of matrices, chunks of text"
    ):
        with matmuls_in(passes.dtype, device):
            model.base_model(input_ids=ids.to(device), use_cache=False)


def _run_back(
    model: PreTrainedModel,
    architecture: Architecture,
    tokens: Tensor,
    passes: _Passes,
    embedded: MomentSum,
) -> int:
    """Run text forward and back, chunk by chunk; return how many tokens were predicted.

    The gradients by what the embedding writes are added to `embedded`.
    """
    device = model.device
    rows = max(1, GRADIENT_CHUNK // tokens.shape[1])
    uniforms = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(passes.seed))
    chunks = list(zip(torch.split(tokens, rows), torch.split(uniforms, rows), strict=True))
    predicted = 0
    # Weights are frozen: the graph that gradients flow back through begins at the embedding's output.

    def begin(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        output.requires_grad_(True).register_hook(embedded.add)  # type: ignore[no-untyped-call]

    handle = model.get_submodule(architecture.embedding).register_forward_hook(begin)
    try:
        for ids, draws in track(chunks, "gradients, chunks of text"):
            with matmuls_in(passes.dtype, device):
                loss, count = _loss(model, ids.to(device), draws.to(device), passes.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            predicted += count
    finally:
        handle.remove()
    return predicted


def _loss(model: PreTrainedModel, ids: Tensor, uniforms: Tensor, labels: Labels) -> tuple[Tensor, int]:
    """Return the cross entropy summed over tokens, in nats, and how many tokens that is."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if labels == "text":
        logits, targets = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    else:
        logits = logits.flatten(0, 1)
        targets = draw(logits.detach(), uniforms.flatten())
    return nn.functional.cross_entropy(logits, targets, reduction="sum"), len(targets)


def _keep(path: Path, packed: Mapping[str, Tensor]) -> None:
    needed = sum(tensor.nbytes for tensor in packed.values())
    if needed > CACHE_LIMIT:
        logger.info("not cached: statistics of %s exceed %s", size(needed), size(CACHE_LIMIT))
    else:
        write_tensors(path, packed)
