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

        with _layers_run(self.layers, record):
            self.model.base_model(input_ids=self.input_ids, use_cache=False)  # the head is not needed
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
        layer = self.layers[index]
        device = next(itertools.chain(layer.parameters(), layer.buffers())).device
        args, kwargs = self._calls[index]
        output: Tensor = layer(*_moved((self.hidden[version], *args), device), **_moved(kwargs, device))
        return output

    @torch.no_grad()
    def finish(self, version: str) -> Tensor:
        """Return the model's output on the last hidden states: logits, or an encoder's last hidden state."""
        hidden = self.hidden[version].to(self.input_ids.device)
        with _layers_run(self.layers, lambda *args, **kwargs: hidden):
            output = self.model(input_ids=self.input_ids, use_cache=False)
        result: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return result


def _moved(value: Any, device: torch.device) -> Any:
    """Return a layer's arguments with every tensor in them on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if isinstance(value, tuple | list) else value


@contextmanager
def _layers_run(layers: nn.ModuleList, forward: LayerForward) -> Iterator[None]:
    """Let every layer run `forward` instead of its own; attributes that the model reads stay in place."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
