"""A list of changes over a stored model: read from the files or out of memory, the layers are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rk_export.methods.prune.pruned import Pruned
from rk_export.plan import Pruning
from rk_export.source.memory import Memory
from rk_export.source.prepared import Prepared
from rk_export.source.stored import StoredModel
from rk_export.source.transformed import Transform, Transformed

SourceOf = Callable[..., StoredModel]


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def changes(source: StoredModel, pruning: Pruning | None) -> tuple[Transform, ...]:
    prepared = Prepared(source.description, ("fold", "rotate", "rotate-heads"))
    if pruning is None:
        return (prepared,)
    return prepared, Pruned(source.description, pruning, None, torch.device("cpu"))


@pytest.mark.parametrize("pruning", [None, Pruning((1,)), Pruning((0, 1), 96)])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_what_is_made_from_memory_is_what_is_made_from_files(
    source_of: SourceOf, family: str, pruning: Pruning | None
) -> None:
    source = source_of(family, tie_word_embeddings=True)
    transforms = changes(source, pruning)
    expected = Transformed(source, transforms).load()
    memory = Memory()
    begun = Transformed(source, (), memory)
    assert same(begun.shared(), source.load())
    for transform in transforms:
        begun = begun.then(transform)
        begun.shared()
    assert same(begun.shared(), expected)
    assert begun.shared() is begun.shared()
    assert same(begun.load(), expected)  # takes it out of memory
    assert memory.whole(transforms) is None
    assert same(begun.load(), expected)  # reads it anew


def test_experts_come_out_of_memory_too(source_of: SourceOf) -> None:
    source = source_of("mixtral")
    transforms = changes(source, None)
    kept = Transformed(source, (), Memory())
    kept.shared()
    assert same(Transformed(source, transforms).load(), kept.then(transforms[0]).load())


def test_a_look_keeps_the_layers_and_a_layer_is_taken_once(source_of: SourceOf) -> None:
    source, memory = source_of("llama"), Memory()
    kept = Transformed(source, (), memory)
    model = kept.shared()
    assert [layer.module for layer in kept.layers()] == list(model.model.layers)
    assert kept.shared() is model
    skeleton = kept.skeleton()
    first = kept.load_layer(skeleton, 0)
    assert kept.load_layer(skeleton, 0) is first
    assert memory.whole(()) is None
    assert same(kept.load_layer(kept.skeleton(), 0), first)  # from the files
    kept.load_layer(skeleton, 1)
    assert memory.take_layer(1) is None


def test_what_is_made_of_a_taken_layer_is_not_read_again(source_of: SourceOf) -> None:
    source = source_of("llama")
    expected = source.load().model.layers[0].mlp.up_proj.weight.clone()
    kept = Transformed(source, (), Memory())
    kept.shared()
    kept.load().model.layers[0].mlp.up_proj.weight.data.zero_()
    assert torch.equal(kept.load().model.layers[0].mlp.up_proj.weight, expected)
    assert torch.equal(source.load().model.layers[0].mlp.up_proj.weight, expected)


def test_a_closed_memory_keeps_nothing(source_of: SourceOf) -> None:
    kept = Transformed(source_of("llama"), (), Memory())
    kept.shared()
    kept.forget()
    assert kept.shared() is not kept.shared()


def test_codes_are_those_of_an_unchanged_model(source_of: SourceOf) -> None:
    source = source_of("llama")
    assert Transformed(source).has_grids == source.has_grids
    assert not source.then(Prepared(source.description, ("fold",))).has_grids
