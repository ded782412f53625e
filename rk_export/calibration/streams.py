"""Probe tokens carried through a model layer by layer, beside the rewriting of its layers.

Several versions of the model (dense, factorized, quantized) never stand in memory together: each layer runs
in every version while it is there, on hidden states that its own version produced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.model.families.registry import family_of
from rk_export.model.torch_logits import output_of, without_cache

LayerForward = Callable[..., Tensor]


class Streams:
    """Hidden states of several versions of one model, between two layers.

    Args:
        model: The model; its embeddings and head must be filled, its layers need not be.
        layers: The layer list inside it.
        input_ids: Probe tokens, int64 (batch, length), without padding.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, input_ids: Tensor) -> None:
        self.model, self.layers, self.input_ids = model, layers, input_ids
        self.hidden: dict[str, Tensor] = {}
        architecture = family_of(model.config).names(model.config)
        self._gives_states = architecture.is_encoder
        self._in_tuples = architecture.tuple_layers
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @torch.no_grad()
    def start(self, version: str) -> None:
        """Embed the probe tokens with the model's present embedding and begin a version there."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        entries: list[Tensor] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            entries.append(hidden)
            calls.append((args, kwargs))
            return hidden

        with self._layers_run(record):
            self._base(self.input_ids)  # the head is not needed
        self._calls = calls
        self.hidden[version] = entries[0]

    @torch.no_grad()
    def advance(self, version: str, index: int) -> Tensor:
        """Run one version through layer `index` as it stands now; return the hidden states (batch, length, d)."""
        self.hidden[version] = self.run(version, index)
        return self.hidden[version]

    @torch.no_grad()
    def run(self, version: str, index: int) -> Tensor:
        """Return what layer `index`, wherever it is, makes of a version; the version stays where it was."""
        return self.through(index, self.hidden[version])

    def through(self, index: int, hidden: Tensor) -> Tensor:
        """Return what layer `index` makes of hidden states (batch, length, d), to be differentiated."""
        layer = self.layers[index]
        device = next(itertools.chain(layer.parameters(), layer.buffers())).device
        args, kwargs = self._calls[index]
        output: Tensor | tuple[Tensor, ...] = layer(
            *_moved((hidden, *args), device), **_moved(kwargs, device)
        )
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def finish(self, version: str) -> Tensor:
        """Return the model's output on the last hidden states: logits, or what an encoder gives."""
        hidden = self.hidden[version].to(self.input_ids.device)
        with self._layers_run(lambda *args, **kwargs: hidden):
            return output_of(self.model, torch.zeros_like(self.input_ids))  # nobody reads them

    def output(self, hidden: Tensor) -> Tensor:
        """Return what comes of any last hidden states (batch, length, d), to be differentiated.

        That is a decoder's logits, or an encoder's own hidden states, whatever classifier may follow them.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)  # nobody reads them
        with self._layers_run(lambda *args, **kwargs: hidden):
            if not self._gives_states:
                return output_of(self.model, ids)
            states: Tensor = self._base(ids).last_hidden_state
            return states

    def before_layers(self, embedding: nn.Module, gradient: Tensor) -> Tensor:
        """Return the gradient by what the embedding writes, given that by what the first layer reads."""
        written: list[Tensor] = []

        def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            written.append(output.detach().requires_grad_(True))
            return written[0]

        handle, entries = embedding.register_forward_hook(note), list[Tensor]()
        try:
            with torch.enable_grad(), self._layers_run(_keeping(entries)):
                self._base(self.input_ids)
        finally:
            handle.remove()
        (found,) = torch.autograd.grad(entries[0], written[0], gradient.to(entries[0].device))
        return found

    def _base(self, ids: Tensor) -> Any:
        """Run the model without its head."""
        return self.model.base_model(input_ids=ids, **without_cache(self.model))

    @contextmanager
    def _layers_run(self, forward: LayerForward) -> Iterator[None]:
        """Let every layer run `forward` instead of its own; attributes that the model reads stay in place."""

        def as_layers_do(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            output = forward(*args, **kwargs)
            return (output,) if self._in_tuples else output

        for layer in self.layers:
            layer.forward = as_layers_do
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward


def _keeping(entries: list[Tensor]) -> LayerForward:
    """Return a layer that only notes what it reads."""

    def keep(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entries.append(hidden)
        return hidden

    return keep


def _moved(value: Any, device: torch.device) -> Any:
    """Return a layer's arguments with every tensor in them on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if isinstance(value, tuple | list) else value
