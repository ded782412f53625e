"""What a dense model tells about its matrices: what they read, and how the loss feels what they put out.

With labels drawn from the model's own distribution the outer products of gradients average to the Fisher
information, which is the Hessian of the Kullback-Leibler divergence from the dense model at the dense weights. An
encoder predicts nothing: there the loss is half the squared relative error of its hidden states.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.moments import MomentSum
from rk_export.calibration.objectives import output_error
from rk_export.calibration.recorders import GradientRecorder, InputRecorder, Recorder, recording
from rk_export.calibration.self_text import draw
from rk_export.calibration.statistics_parts import StatisticsParts
from rk_export.calibration.text_run import Objective, TextRun
from rk_export.device import matmul_dtype
from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.model.architecture import Architecture
from rk_export.source.protocol import Source
from rk_export.tensor_cache import text_key

logger = logging.getLogger(__name__)

CHUNK, GRADIENT_CHUNK = 2048, 512  # tokens that run together, forward only and forward and back
GRADIENT_TOKENS = 4096
_VERSION = 4
_IGNORED = -100  # the label of a token that nothing is predicted for

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
    folder: Path | None = None,
) -> DenseStatistics:
    """Gather statistics of a dense model on a text, or read those of an earlier run.

    One layer at a time is in memory, and what is known of it lies on disk: in the cache, by the model's files and what
    was done to it, or elsewhere where all layers together take more than the cache's limit. What an earlier run left in
    the cache is found without loading the model, and a run that was interrupted goes on with what is missing.

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
        folder: Takes what is too large for the cache, for the time of a run.

    Raises:
        InputError: If its logits are not finite.
    """
    passes = _Passes(diagonal, gradient_tokens, labels, seed, dtype or matmul_dtype(device))
    key = {**passes.key(), **text_key(tokens), "model": source.fingerprint(cache_dir)}
    parts = StatisticsParts(key, cache_dir, folder)
    if not parts.read(source.layer_count, with_gradients=gradient_tokens > 0):
        _Gathering(source, tokens, passes, parts, device, folder).run()
    return DenseStatistics.from_tensors(parts.known)


class _Gathering:
    """One run of the text through the model, forward and back."""

    def __init__(
        self,
        source: Source,
        tokens: Tensor,
        passes: _Passes,
        parts: StatisticsParts,
        device: torch.device,
        folder: Path | None,
    ) -> None:
        self._source, self._passes, self._parts = source, passes, parts
        sequences = max(1, passes.gradient_tokens // tokens.shape[1]) if passes.gradient_tokens else 0
        self._tokens, self._back = tokens, tokens[:sequences]
        self._model = source.shared()
        chunks = [*_chunks(self._back, GRADIENT_CHUNK), *_chunks(tokens[sequences:], CHUNK)]
        self._run = TextRun(
            self._model,
            source.architecture,
            chunks,
            back=len(_chunks(self._back, GRADIENT_CHUNK)),
            device=device,
            dtype=passes.dtype,
            folder=folder,
        )

    def run(self) -> None:
        """Gather every part that is missing."""
        self._run.forward("inputs of matrices, layers", self._inputs)
        predicted, embedded = 0, {}
        if len(self._back):
            loss, predicted = self._objective()
            self._run.backward("gradients, layers", loss, lambda index: self._gradients(index, predicted))
            written = MomentSum(diagonal=True)
            for gradient in self._run.embedded():
                written.add(gradient)
            embedded = {"embedding": written.mean()}
        self._parts.add("rest", {"tokens": torch.tensor(predicted or self._tokens.numel()), **embedded})

    def _objective(self) -> tuple[Objective, int]:
        """Return what is differentiated, and how many tokens it is summed over."""
        if self._source.architecture.is_encoder:
            return output_error(self._run, self._passes.seed), self._back.numel()
        loss = _Loss(self._back, self._passes.labels, self._passes.seed)
        return loss, loss.predicted

    @contextmanager
    def _inputs(self, index: int) -> Iterator[None]:
        """Keep what the matrices of a layer read while text passes it."""
        if self._parts.find("inputs", index):
            yield
            return
        inputs = InputRecorder()
        with self._recording(index, inputs.record):
            yield
        known = DenseStatistics(
            inputs.second(), inputs.peaks(), inputs.token_peaks(), {}, 0, None, inputs.reads()
        )
        packed = known.of_matrices()
        if index == 0:
            self._parts.limit(
                self._layers * sum(item.nbytes for item in packed.values()) + self._gradient_bytes
            )
        self._parts.add("inputs", packed, index)

    @contextmanager
    def _gradients(self, index: int, predicted: int) -> Iterator[None]:
        """Keep what gradients flow back to the matrices of a layer."""
        if self._parts.find("gradients", index):
            yield
            return
        gradients = GradientRecorder(diagonal=self._passes.diagonal)
        with self._recording(index, gradients.record):
            yield
        known = DenseStatistics({}, {}, {}, gradients.moments(predicted), 0, None)
        self._parts.add("gradients", known.of_matrices(), index)

    def _recording(self, index: int, recorder: Recorder) -> AbstractContextManager[None]:
        return recording(_matrices(self._model, self._source.architecture, index), recorder)

    @property
    def _layers(self) -> int:
        return self._source.layer_count

    @property
    def _gradient_bytes(self) -> int:
        if not self._passes.gradient_tokens:
            return 0
        rows = [matrix.shape[0] for matrix in self._source.description.matrices]
        return 4 * sum(rows if self._passes.diagonal else (count**2 for count in rows))


def output_weights(
    source: Source, tokens: Tensor, device: torch.device, folder: Path | None = None
) -> dict[MatrixId, Tensor]:
    """Return the mean over tokens of the squared gradient of a token's loss by what each matrix puts out, (out,).

    Args:
        source: The dense model.
        tokens: Text, int64 (sequences, length); labels are drawn from the model's distribution.
        device: Where the passes run.
        folder: As in `dense_statistics`.

    Raises:
        InputError: If the model is an encoder, or its logits are not finite.
    """
    _check_decoder(source.architecture)
    model, gradients = source.shared(), GradientRecorder(diagonal=True)
    chunks = _chunks(tokens, GRADIENT_CHUNK)
    run = TextRun(model, source.architecture, chunks, back=len(chunks), device=device, folder=folder)
    loss = _Loss(tokens, "model", 0)
    run.forward("hidden states, layers")
    run.backward(
        "gradients, layers",
        loss,
        lambda index: recording(_matrices(model, source.architecture, index), gradients.record),
    )
    predicted = loss.predicted
    return {place: moment * predicted for place, moment in gradients.moments(predicted).items()}


def _chunks(tokens: Tensor, together: int) -> tuple[Tensor, ...]:
    """Return a text (sequences, length) in pieces of so many tokens, in whole sequences."""
    return torch.split(tokens, max(1, together // tokens.shape[1])) if len(tokens) else ()


def _matrices(model: PreTrainedModel, architecture: Architecture, index: int) -> dict[MatrixId, nn.Module]:
    """Return the matrices of a layer."""
    layer = cast(nn.ModuleList, model.get_submodule(architecture.layers))[index]
    return {
        MatrixId(index, item.path): layer.get_submodule(item.path)
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


class _Loss:
    """The cross entropy summed over the tokens of a text, in nats.

    Args:
        tokens: int64 (sequences, length).
        labels: What is to be predicted, as in `dense_statistics`.
        seed: Of drawn labels.
    """

    def __init__(self, tokens: Tensor, labels: Labels, seed: int) -> None:
        self._uniforms = self._next = None
        if labels == "model":
            self._uniforms = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).flatten()
            self.predicted = tokens.numel()
        else:
            self._next = nn.functional.pad(tokens[:, 1:], (0, 1), value=_IGNORED).flatten()
            self.predicted = len(tokens) * (tokens.shape[1] - 1)

    def __call__(self, logits: Tensor, places: slice) -> Tensor:
        """Return the loss of some of the text's tokens, given their logits (tokens, vocabulary)."""
        if self._uniforms is not None:
            targets = draw(logits.detach(), self._uniforms[places].to(logits.device))
        else:
            targets = cast(Tensor, self._next)[places].to(logits.device)
        return nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=_IGNORED)
