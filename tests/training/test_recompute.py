"""Layers that compute their activations again: gradients stay what they are, and no activation waits for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from compressed import tokens
from torch import Tensor, nn

from rk_export import scratch
from rk_export.source.stored import StoredModel
from rk_export.training.recompute import recomputed

SourceOf = Callable[..., StoredModel]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo2", "mixtral"])
def test_the_gradients_are_the_same(
    source_of: SourceOf, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "SMALLEST", 1)  # what layers read lies on disk
    source = source_of(family)
    model, ids = source.load().requires_grad_(True), tokens(source)
    layers = list(model.get_submodule(source.architecture.layers).children())
    gradients = []
    for context in (nullcontext(), recomputed(layers)):
        with context:
            loss = model(ids, use_cache=False).logits.square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert all("forward" not in vars(layer) for layer in layers)
    for first, second in zip(*gradients, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


def test_no_activation_waits_for_the_way_back(source_of: SourceOf) -> None:
    source = source_of("llama", num_hidden_layers=3)
    model, ids = source.load().requires_grad_(True), tokens(source)
    layers = list(model.get_submodule(source.architecture.layers).children())
    alive = _Watched(layers)
    loss = model(ids, use_cache=False).logits.square().mean()
    assert alive.count == 3
    del loss
    with recomputed(layers):
        loss = model(ids, use_cache=False).logits.square().mean()
    assert alive.count == 0
    alive.order.clear()
    loss.backward()
    assert alive.order == [2, 1, 0]  # each is computed again when its turn comes


class _Watched:
    """Counts the outputs of the layers' gates that exist, and notes in which order the layers run."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._outputs: list[weakref.ref[Tensor]] = []
        self.order: list[int] = []
        for index, layer in enumerate(layers):
            layer.get_submodule("mlp.gate_proj").register_forward_hook(partial(self._note, index))

    @property
    def count(self) -> int:
        return sum(output() is not None for output in self._outputs)

    def _note(self, index: int, module: nn.Module, arguments: object, output: Tensor) -> None:
        self.order.append(index)
        self._outputs.append(weakref.ref(output))
