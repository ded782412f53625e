"""Probe tokens carried layer by layer against whole forward passes of each version of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed import INT4, SourceOf, compress, floats, logits, tokens
from tiny_models import FAMILIES
from torch import nn

from rk_export.calibration.streams import Streams
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.rewrite.apply import DENSE, FACTORIZED, QUANTIZED


def options(**changes: Any) -> Recipe:
    return floats(("qk",), rank=RankRule("rank", 12), **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_whole_models(source_of: SourceOf, family: str) -> None:
    """Three versions at once equal three models, each rewritten on its own."""
    source = source_of(family)
    ids = tokens(source, length=9)
    rewritten = compress(source, options(quant=INT4, table=QuantSpec(8, 16)), probe=ids)
    probe = rewritten.probe_logits
    assert set(probe) == {DENSE, FACTORIZED, QUANTIZED}
    torch.testing.assert_close(probe[DENSE], logits(source.load(), ids))
    torch.testing.assert_close(probe[FACTORIZED], logits(compress(source, options()).model, ids))
    torch.testing.assert_close(probe[QUANTIZED], logits(rewritten.model, ids))
    assert not torch.equal(probe[FACTORIZED], probe[DENSE])
    assert not torch.equal(probe[QUANTIZED], probe[FACTORIZED])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_layer_errors_are_those_of_the_hidden_states(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    ids = tokens(source, length=9)
    rewritten = compress(source, options(quant=INT4), probe=ids)
    hidden = {
        "dense": hidden_states(source.load(), source.architecture.layers, ids),
        "factorized": hidden_states(compress(source, options()).model, source.architecture.layers, ids),
        "quantized": hidden_states(rewritten.model, source.architecture.layers, ids),
    }
    assert [error.layer for error in rewritten.layer_errors] == list(range(source.layer_count))
    for error in rewritten.layer_errors:
        dense = hidden["dense"][error.layer]
        for version in ("factorized", "quantized"):
            expected = float((hidden[version][error.layer] - dense).norm() / dense.norm())
            assert getattr(error, version) == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def hidden_states(model: nn.Module, layers: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of every layer, caught by hooks."""
    states: list[torch.Tensor] = []
    for layer in model.get_submodule(layers).children():
        layer.register_forward_hook(lambda module, args, output: states.append(first(output)))
    model(input_ids=ids, use_cache=False)
    return states


def first(output: Any) -> torch.Tensor:
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def test_a_rewrite_without_changes_has_no_error(source_of: SourceOf) -> None:
    source = source_of("llama")
    ids = tokens(source)
    rewritten = compress(source, floats(), probe=ids)
    assert all(error.factorized == error.quantized == 0 for error in rewritten.layer_errors)
    assert torch.equal(rewritten.probe_logits[QUANTIZED], rewritten.probe_logits[DENSE])


def test_without_a_probe_nothing_is_streamed(source_of: SourceOf) -> None:
    rewritten = compress(source_of("llama"), options())
    assert rewritten.layer_errors == ()
    assert rewritten.probe_logits == {}


def test_the_layers_are_left_as_they_were(source_of: SourceOf) -> None:
    """The patched forwards are gone afterwards, also when the model fails."""
    source = source_of("llama")
    model: Any = source.load()
    layers = model.get_submodule(source.architecture.layers)
    streams = Streams(model, layers, tokens(source))
    streams.start("dense")
    assert all("forward" not in vars(layer) for layer in layers)
    bad = Streams(model, layers, torch.tensor([[10**6]]))
    with pytest.raises(IndexError):
        bad.start("dense")
    assert all("forward" not in vars(layer) for layer in layers)
    torch.testing.assert_close(
        streams.advance("dense", 0), hidden_states(model, source.architecture.layers, tokens(source))[0]
    )
