"""Canonical form: the function stays, every matrix becomes an nn.Linear that can be replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import DECODERS, FAMILIES, tiny_config, tiny_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import HeadLayout
from rk_export.model.description import describe
from rk_export.model.families.registry import architecture_of, heads_of


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: on tiny matrices more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Replacement(nn.Module):
    """Is called like nn.Linear and has none of its attributes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix, self.offset = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.matrix, self.offset)


def layers_of(model: PreTrainedModel) -> Any:
    return model.get_submodule(architecture_of(model.config).layers)


def canonical(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for layer in layers_of(model):
        architecture_of(model.config).canonicalize(layer)
    return model


def output(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_form_keeps_the_function(family: str) -> None:
    model = tiny_model(family)
    torch.testing.assert_close(output(canonical(model)), output(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_a_linear_that_can_be_replaced(family: str) -> None:
    model = canonical(tiny_model(family))
    before = output(model)
    for index, layer in enumerate(layers_of(model)):
        projections = architecture_of(model.config).projections(model.config, index)
        assert projections
        for projection in projections:
            linear = layer.get_submodule(projection.path)
            assert isinstance(linear, nn.Linear)
            layer.set_submodule(projection.path, Replacement(linear))
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_every_matrix_of_a_decoder_layer_is_a_projection(family: str) -> None:
    model = canonical(tiny_model(family))
    for index, layer in enumerate(layers_of(model)):
        listed = {p.path for p in architecture_of(model.config).projections(model.config, index)}
        assert listed == {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_call_changes_nothing(family: str) -> None:
    model = canonical(tiny_model(family))
    modules = list(model.modules())
    for layer in layers_of(model):
        architecture_of(model.config).canonicalize(layer)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_model_has_the_names_and_shapes_of_the_canonical_one(family: str) -> None:
    empty = describe(tiny_config(family)).canonical.state_dict()
    unused = architecture_of(tiny_config(family)).unused
    filled = {
        name: tensor.shape
        for name, tensor in canonical(tiny_model(family)).state_dict().items()
        if not name.startswith(unused)
    }
    assert {name: tensor.shape for name, tensor in empty.items()} == filled
    assert all(tensor.is_meta for tensor in empty.values())


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral", "qwen3_moe"])
def test_canonical_weights_own_their_memory_and_keep_dtype_and_mode(family: str) -> None:
    model = canonical(tiny_model(family).half())
    layer = layers_of(model)[0]
    for projection in architecture_of(model.config).projections(model.config, 0):
        linear = layer.get_submodule(projection.path)
        assert linear.weight.dtype == torch.float16
        assert linear.weight.untyped_storage().nbytes() == linear.weight.numel() * 2
        assert not linear.training


def test_heads() -> None:
    def heads(config: PretrainedConfig) -> HeadLayout:
        return heads_of(config)

    assert heads(tiny_config("llama")) == HeadLayout(4, 2, 16)
    assert heads(tiny_config("qwen3")) == HeadLayout(4, 2, 32)
    assert heads(tiny_config("gpt2")) == HeadLayout(4, 4, 16)
    assert heads(tiny_config("opt")) == HeadLayout(4, 4, 16)


def test_dense_layers_between_experts_list_their_mlp() -> None:
    config = tiny_config("qwen3_moe", mlp_only_layers=[0])
    roles = [{p.role for p in architecture_of(config).projections(config, index)} for index in (0, 1)]
    assert roles == [{"q", "k", "v", "o", "gate", "up", "down"}, {"q", "k", "v", "o", "expert"}]


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    config = PretrainedConfig()
    config.model_type = "gemma3n"
    with pytest.raises(UnsupportedModelError, match=r"'gemma3n' is not supported[\s\S]*llama[\s\S]*phi3"):
        architecture_of(config)
