"""A source with some tensors replaced: loaded like the one it wraps, prepared or not."""

from __future__ import annotations

import pytest
import torch
from compressed import SourceOf, logits, tokens

from rk_export.errors import InputError
from rk_export.source.prepared import Prepared
from rk_export.source.replaced import Replaced


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "mixtral"])
def test_new_values_are_loaded_in_canonical_layers(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    path = source.architecture.attention[0][1]
    layers, name = source.architecture.layers, f"layers.1.{path}.weight"
    dense = source.load()
    old = dense.get_submodule(f"{layers}.1.{path}").weight
    new = torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    model = source.then(Replaced({name: new})).load()
    found = dict(model.named_parameters())
    for key, parameter in dense.named_parameters():
        expected = new if key == f"{layers}.1.{path}.weight" else parameter
        assert torch.equal(found[key], expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = tokens(source)
    assert not torch.allclose(logits(model, ids), logits(dense, ids))


def test_outer_tensors_keep_the_models_names(source_of: SourceOf) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    embedding = torch.randn(160, 64)
    tuned = source.then(
        Replaced({"model.norm.weight": torch.full((64,), 2.0), "model.embed_tokens.weight": embedding})
    )
    model = tuned.load()
    assert torch.equal(model.model.norm.weight, torch.full((64,), 2.0))
    assert torch.equal(model.lm_head.weight, embedding)  # a tied head sees them too
    tuned.load_rest(model)
    assert torch.equal(model.model.norm.weight, torch.full((64,), 2.0))


def test_a_layer_that_is_loaded_twice_keeps_what_was_changed_since(source_of: SourceOf) -> None:
    source = source_of("llama")
    weight = torch.zeros(64, 64)
    tuned = source.then(Replaced({"layers.0.self_attn.q_proj.weight": weight}))
    model = tuned.skeleton()
    projection = tuned.load_layer(model, 0).self_attn.q_proj
    assert torch.equal(projection.weight, weight)
    projection.weight.data += 1
    assert torch.equal(tuned.load_layer(model, 0).self_attn.q_proj.weight, weight + 1)
    tuned.load_layer(model, 0).to("meta")
    assert torch.equal(tuned.load_layer(model, 0).self_attn.q_proj.weight, weight)


def test_a_prepared_source_stays_prepared(source_of: SourceOf) -> None:
    source = source_of("llama")
    prepared = source.then(Prepared(source.description, ("fold", "rotate")))
    reference = prepared.load()
    values = {
        "layers.0.mlp.up_proj.weight": 2 * reference.model.layers[0].mlp.up_proj.weight,
        "layers.0.input_layernorm.weight": reference.model.layers[0].input_layernorm.weight,
    }
    model = prepared.then(Replaced(values)).load()
    found = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.equal(
            found[name], parameter * (2 if name.endswith("layers.0.mlp.up_proj.weight") else 1)
        )
    unprepared = source.load().model.layers[1].mlp.up_proj.weight
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, unprepared)


def test_a_tuned_source_is_wrapped_again(source_of: SourceOf) -> None:
    source, name = source_of("llama"), "layers.0.self_attn.q_proj.weight"
    first = source.then(Replaced({name: torch.zeros(64, 64), "model.norm.weight": torch.ones(64)}))
    second = first.then(Replaced({name: torch.ones(64, 64)}))
    model = second.load()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, torch.ones(64, 64))
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert [type(transform) for transform in second.transforms] == [Replaced, Replaced]


def test_the_rest_is_asked_of_the_source(source_of: SourceOf) -> None:
    source = source_of("llama")
    tuned = source.then(Replaced({}))
    for name in ("folder", "name", "title", "config", "architecture", "layer_count"):
        assert getattr(tuned, name) is getattr(source, name) or getattr(tuned, name) == getattr(source, name)
    assert tuned.structure() == source.structure()
    assert tuned.parameter_count() == source.parameter_count()
    assert tuned.stored_bytes() == source.stored_bytes()
    key = "model.norm.weight"
    assert torch.equal(tuned.tensor(key), source.tensor(key))
    ids = tokens(source)
    assert torch.equal(logits(tuned.load(), ids), logits(source.load(), ids))


def test_new_values_are_copied(source_of: SourceOf) -> None:
    value = torch.ones(64)
    model = source_of("llama").then(Replaced({"model.norm.weight": value})).load()
    value += 1
    assert torch.equal(model.model.norm.weight, torch.ones(64))


def test_the_variant_tells_values_apart(source_of: SourceOf) -> None:
    source, name = source_of("llama"), "model.norm.weight"
    first, same, other = (
        source.then(Replaced({name: torch.full((64,), value)})) for value in (1.0, 1.0, 2.0)
    )
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0.self_attn.z_proj.weight", (64, 64), "no such tensor"),
        ("layers.0.self_attn.q_proj.weight", (64, 63), "has shape"),
        ("model.nothing.weight", (64,), "no such tensor"),
        ("model.norm.weight", (63,), "has shape"),
        ("layers.7.self_attn.q_proj.weight", (64, 64), "no such layer"),
    ],
)
def test_tensors_of_another_model_are_refused(
    source_of: SourceOf, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        source_of("llama").then(Replaced({name: torch.zeros(shape)})).load()
    assert caught.value.where == name
