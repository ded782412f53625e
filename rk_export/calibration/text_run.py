"""Text that runs through a whole model a layer at a time, forward and back.

All of the text passes one layer before the next one is touched. What is carried from layer to layer are hidden states,
and on the way back the gradients by them; a layer's own activations are computed again when its gradients are taken.
So memory holds one layer and its activations, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.streams import Streams
from rk_export.device import CPU, lent, matmul_dtype, matmuls_in
from rk_export.memory import give_back
from rk_export.model.architecture import Architecture
from rk_export.progress import track
from rk_export.scratch import mapped

_VERSION = "text"
_ENTRY = "entry"
# Logits that exist at a time: rows of the head's output times the vocabulary.
LOGITS_TOGETHER = 1 << 24

# What watches a layer while all text passes it, by the layer's number.
At = Callable[[int], AbstractContextManager[object]]
Objective = Callable[[Tensor, slice], Tensor]


def _unwatched(index: int) -> AbstractContextManager[object]:
    return nullcontext()


class TextRun:
    """Chunks of text on their way through a model.

    Args:
        model: A whole model on the CPU, mapped where it would not fit into memory; its parameters are frozen.
        architecture: Its family.
        chunks: Token ids, int64 (sequences, length) each, without padding.
        back: How many of the first chunks are to run back.
        device: Where layers and head compute, one at a time.
        dtype: What matrices multiply in; None takes `matmul_dtype` of the device.
        folder: Whose disk keeps what the layers read until the way back, as in `mapped`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        chunks: Sequence[Tensor],
        *,
        back: int = 0,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
        folder: Path | None = None,
    ) -> None:
        self._model, self._architecture = model.requires_grad_(False), architecture
        self._layers = cast(nn.ModuleList, model.get_submodule(architecture.layers))
        self._chunks = [Streams(model, self._layers, ids) for ids in chunks]
        self._back, self._device, self._folder = back, device, folder
        self._dtype = dtype or matmul_dtype(device)
        self._entries: list[list[Tensor]] = []
        self._gradients: list[Tensor] = []

    def forward(self, title: str, at: At = _unwatched) -> None:
        """Run all chunks through all layers.

        Args:
            title: What the progress bar says.
            at: Entered around each layer while all chunks pass it.
        """
        for chunk in self._chunks:
            chunk.start(_VERSION)
        for index, layer in enumerate(track(self._layers, title)):
            self._entries.append([self._kept(chunk) for chunk in self._chunks[: self._back]])
            with lent(layer, self._device), at(index):
                for chunk in self._chunks:
                    with self._matmuls():
                        chunk.advance(_VERSION, index)
            give_back()

    def backward(self, title: str, objective: Objective, at: At = _unwatched) -> None:
        """Run the chunks that run back from the loss to the first layer.

        Args:
            title: What the progress bar says.
            objective: From logits (tokens, vocabulary) and their places in the flattened text of these chunks to the
                sum of what is differentiated.
            at: Entered around each layer while these chunks pass it back.
        """
        gradients = list(self._from_the_top(objective))
        for index in track(range(len(self._layers) - 1, -1, -1), title, len(self._layers)):
            entries = self._entries.pop()
            with lent(self._layers[index], self._device), at(index):
                for number, chunk in enumerate(self._chunks[: self._back]):
                    entry = entries[number].to(self._device).requires_grad_(True)
                    with torch.enable_grad(), self._matmuls():
                        output = chunk.through(index, entry)
                    output.backward(gradients[number].to(output.device))  # type: ignore[no-untyped-call]
                    gradients[number] = cast(Tensor, entry.grad)
            give_back()
        self._gradients = gradients

    def embedded(self) -> Iterator[Tensor]:
        """Yield the gradients by what the embedding writes (sequences, length, d), of each chunk that ran back."""
        embedding = self._model.get_submodule(self._architecture.embedding)
        for chunk, gradient in zip(self._chunks, self._gradients, strict=False):
            yield chunk.before_layers(embedding, gradient)

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """Yield the logits of all text, some tokens (tokens, vocabulary) at a time in the text's order."""
        with self._head():
            for chunk in self._chunks:
                for states in torch.split(chunk.hidden[_VERSION].flatten(0, 1), self._together):
                    yield self._logits(chunk, states)

    def _from_the_top(self, objective: Objective) -> Iterator[Tensor]:
        """Yield the gradients by the last hidden states of each chunk that runs back."""
        begin = 0
        with self._head():
            for chunk in self._chunks[: self._back]:
                hidden = chunk.hidden[_VERSION]
                parts = []
                for states in torch.split(hidden.flatten(0, 1), self._together):
                    leaf = states.detach().requires_grad_(True)
                    with torch.enable_grad():
                        total = objective(self._logits(chunk, leaf), slice(begin, begin + len(states)))
                    total.backward()  # type: ignore[no-untyped-call]
                    parts.append(cast(Tensor, leaf.grad))
                    begin += len(states)
                yield torch.cat(parts).view(hidden.shape)

    def _logits(self, chunk: Streams, states: Tensor) -> Tensor:
        with self._matmuls():
            return chunk.output(states[:, None])[:, 0].float()

    @contextmanager
    def _head(self) -> Iterator[None]:
        """Have everything outside the layers on the device."""
        family = self._architecture
        with ExitStack() as stack:
            for path in (family.embedding, family.lm_head, *family.outer):
                if path:
                    stack.enter_context(lent(self._model.get_submodule(path), self._device))
            yield

    def _kept(self, chunk: Streams) -> Tensor:
        return mapped({_ENTRY: chunk.hidden[_VERSION]}, self._folder)[_ENTRY]

    def _matmuls(self) -> AbstractContextManager[object]:
        return matmuls_in(self._dtype, self._device)

    @property
    def _together(self) -> int:
        return max(1, LOGITS_TOGETHER // int(self._model.config.vocab_size))
