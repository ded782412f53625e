"""Loading layer by layer against from_pretrained, and folders that cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_config
from compressed import SourceOf, logits, tokens
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from rk_export.errors import InputError, RkExportError, UnsupportedModelError
from rk_export.source.stored import open_source

CONVERTED = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_equals_from_pretrained(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    auto = AutoModel if source.architecture.is_encoder else AutoModelForCausalLM
    expected = auto.from_pretrained(source.folder, attn_implementation="eager").eval()
    ids = tokens(source)
    torch.testing.assert_close(logits(source.load(), ids), logits(expected, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CONVERTED])
def test_a_skeleton_holds_no_weights_and_one_layer_at_a_time(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    model = source.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    layer = source.load_layer(model, 1)
    layers = model.get_submodule(source.architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    assert layers[1] is layer
    assert not any(parameter.is_meta for parameter in layer.parameters())
    assert all(parameter.is_meta for parameter in layers[0].parameters())
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_a_linear_in_canonical_form(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    loaded, empty = source.load(), source.description.canonical
    assert shapes_of(loaded) == shapes_of(empty)
    for index in range(source.layer_count):
        layer = loaded.get_submodule(f"{source.architecture.layers}.{index}")
        for projection in source.architecture.projections(source.config, index):
            assert isinstance(layer.get_submodule(projection.path), nn.Linear)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "gemma3"])
def test_shards_and_half_precision(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source, ids = open_source(tmp_path), tokens(source_of(family))
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    torch.testing.assert_close(logits(source.load(), ids), logits(expected.eval(), ids), rtol=1e-4, atol=1e-4)
    assert source.stored_bytes() < source_of(family).stored_bytes()
    assert source.parameter_count() == source_of(family).parameter_count()
    assert source.structure() == source_of(family).structure()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor(source_of: SourceOf, tied: bool) -> None:
    source = source_of("llama", tie_word_embeddings=tied)
    model = source.load()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert source.parameter_count() == sum(parameter.numel() for parameter in model.parameters())


def test_checkpoints_of_the_base_model_and_of_the_whole_one(source_of: SourceOf, tmp_path: Path) -> None:
    """GPT-2 and BERT stand on the hub with and without the prefix of the base model."""
    source = source_of("gpt2")
    shutil.copytree(source.folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / "model.safetensors"
    )
    ids = tokens(source)
    assert torch.equal(logits(open_source(tmp_path).load(), ids), logits(source.load(), ids))


def test_structure_tells_shapes_apart(source_of: SourceOf) -> None:
    structures = {
        source_of("llama").structure(),
        source_of("llama", num_hidden_layers=1).structure(),
        source_of("llama", intermediate_size=96).structure(),
        source_of("mistral").structure(),
    }
    assert len(structures) == 4


@pytest.fixture
def folder(source_of: SourceOf, tmp_path: Path) -> Path:
    """Return a copy of the tiny llama to be damaged."""
    return Path(shutil.copytree(source_of("llama").folder, tmp_path / "model"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder: Path, *, load: bool = True) -> RkExportError:
    """Return the error of opening, and loading, a folder; it says what, where and how to fix it."""
    with pytest.raises(InputError) as caught:
        open_source(folder).load() if load else open_source(folder)
    error = caught.value
    assert error.what
    assert error.where
    assert error.fix
    return error


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_its_tensor(
    source_of: SourceOf, tmp_path: Path, family: str, bad: float
) -> None:
    folder = Path(shutil.copytree(source_of(family).folder, tmp_path / "model"))
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[3:5].fill_(bad))
    error = refusal(folder)
    assert name in error.what
    assert "2 values" in error.what
    assert (error.where or "").endswith("model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert name in refusal(folder).what


def test_a_missing_tensor_of_a_converted_family_is_named(source_of: SourceOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_of("mixtral").folder, tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
    assert "o_proj" in refusal(folder).what


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_tensor_of_another_shape_is_named(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    folder = Path(shutil.copytree(source_of(family).folder, tmp_path / "model"))
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(8, 64)}))
    message = str(refusal(folder))
    assert name in message
    assert "[8, 64]" in message
    assert "[32, 64]" in message


@pytest.mark.parametrize("kept", [0, 4, 200, 20_000])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    error = refusal(folder, load=False)
    assert error.where == str(path)
    assert "truncated" in error.what


def test_a_lost_shard_and_a_broken_index(source_of: SourceOf, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    assert str(shard) == refusal(tmp_path, load=False).where
    tensors = load_file(sorted(tmp_path.glob("model-*.safetensors"))[0])
    save_file(tensors, shard)
    assert "lies in two files" in refusal(tmp_path, load=False).what
    save_file({"model.other.weight": torch.zeros(1)}, shard)
    assert "is missing, which the index puts there" in refusal(tmp_path, load=False).what
    shard.write_bytes(kept)
    open_source(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "{}", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        assert refusal(tmp_path, load=False).where == str(index)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_weights_are_never_read(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    error = refusal(folder, load=False)
    assert name in error.what
    assert "pickle" in error.what
    assert "save_pretrained" in (error.fix or "")


def test_a_folder_without_weights_or_config(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder, load=False).what
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder, load=False).what
    assert "no such file or folder" in refusal(tmp_path / "absent", load=False).what


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    error = refusal(folder / "config.json", load=False)
    assert error.where == str(folder / "config.json")
    broken = folder / "weights.gguf"
    broken.write_bytes(b"not a gguf file, but long enough to hold a header")
    assert refusal(broken, load=False).where == str(broken)


@pytest.mark.parametrize("text", ["", "{", "[]", '"llama"'])
def test_a_config_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder, load=False).where == str(folder / "config.json")


@pytest.mark.parametrize("changes", [{"model_type": "nonesuch"}, {"hidden_size": "many"}])
def test_a_config_that_transformers_refuses(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    assert refusal(folder, load=False).where == str(folder / "config.json")


def test_an_unknown_family_lists_the_known_ones(folder: Path) -> None:
    edit_config(folder, model_type="xglm", architectures=["XGLMForCausalLM"])
    with pytest.raises(UnsupportedModelError) as caught:
        open_source(folder)
    assert "xglm" in caught.value.what
    assert "llama" in (caught.value.fix or "")
    assert "gemma3_text" in (caught.value.fix or "")


def test_more_layers_in_the_config_than_in_the_file(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    error = refusal(folder, load=False)
    assert "config.json says 3 layers (num_hidden_layers), the files hold 2" in error.what
    assert "model.layers.2." in error.what
