"""One source for what a norm feeds, how its gain is stored, and what stands between the values and the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import DECODERS

from rk_export.model.decoder_spec import NormNames
from rk_export.model.description import ModelDescription, describe
from rk_export.model.exported_names import rename_tensors
from rk_export.model.layer_wiring import wiring_of
from rk_export.model.preparable import preparations_of
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]


@pytest.mark.parametrize("family", DECODERS)
def test_a_norm_feeds_what_the_wiring_names_and_nothing_else(source_of: SourceOf, family: str) -> None:
    """Moving a norm's output moves the inputs of its readers and of no other matrix of the layer."""
    source = source_of(family)
    model = source.load()
    layer = model.get_submodule(f"{source.architecture.layers}.1")
    wiring = wiring_of(source.description, 1)
    paths = [item.path for item in source.architecture.projections(source.config, 1) if item.role != "expert"]

    def inputs(moved: str = "") -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            layer.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: seen.__setitem__(path, args[0])
            )
            for path in paths
        ]
        if moved:
            norm = layer.get_submodule(moved)
            handles.append(norm.register_forward_hook(lambda module, args, output: output + 1.0))
        with torch.no_grad():
            model(input_ids=torch.arange(3, 9)[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    still = inputs()
    for norm, readers in wiring.norms.items():
        moved = inputs(norm)
        for path in set(readers) & set(paths):
            torch.testing.assert_close(moved[path], still[path] + 1.0)
        # What comes before in the layer stays; nothing else is moved by exactly one.
        for path in set(paths) - set(readers):
            assert not torch.allclose(moved[path], still[path] + 1.0)


@pytest.mark.parametrize("family", DECODERS)
def test_a_stored_gain_is_read_alike_everywhere(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    model = source.load()
    for norm in wiring_of(source.description, 0).norms:
        path = f"{source.architecture.layers}.0.{norm}"
        module = model.get_submodule(path)
        weight = module.get_parameter("weight")
        (exported,) = rename_tensors(source.architecture, {f"{path}.weight": weight}, tied=False).values()
        alternating = torch.ones(1, 1, len(weight))
        alternating[..., 1::2] = -1.0  # mean zero, mean square one: the norm multiplies it by its gain
        with torch.no_grad():
            high, low = module(alternating), module(-alternating)
        torch.testing.assert_close(((high - low) / 2 * alternating)[0, 0], exported, rtol=1e-4, atol=1e-5)
        offset = float(wiring_of(source.description, 0).unit_offset)
        torch.testing.assert_close(weight + offset, exported)


def test_one_norm_may_feed_attention_and_mlp(source_of: SourceOf) -> None:
    parallel = NormNames("input_layernorm", None, "input_layernorm", None)
    (readers,) = wiring_of(changed(source_of("llama"), norm_names=parallel), 0).norms.values()
    assert [path.rpartition(".")[2] for path in readers] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    ]


def test_values_that_are_not_only_mixed_are_not_rotated(source_of: SourceOf) -> None:
    source = source_of("llama")
    assert preparations_of(source.description, ("rotate-heads",)).names == ("rotate-heads",)
    refused = preparations_of(changed(source, sub_norms=True), ("rotate-heads",))
    assert refused.names == ()
    assert "a norm over all of them stands between the values of llama" in refused.findings[0].reason


def changed(source: StoredModel, **fields: Any) -> ModelDescription:
    """Return a description of the model whose decoder has other fields."""
    description = describe(source.config)
    vars(description)["decoder"] = replace(description.decoder, **fields)
    return description


def test_families_with_an_offset_are_named_once(source_of: SourceOf) -> None:
    offset = {family for family in DECODERS if source_of(family).architecture.unit_offset}
    assert offset == {"gemma2", "gemma3"}
