"""Checkpoints as people have them: what the files hold wins, every tensor is used or named, as in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    EMBEDDING,
    Edit,
    Tensors,
    edit_config,
    edit_tensors,
    inside,
    multimodal,
    prefixed,
    sharded,
    with_head,
)
from conftest import Cli
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from rk_export.errors import InputError
from rk_export.runtime import Session
from rk_export.source.prepared import Prepared
from rk_export.source.stored import StoredModel, open_source

Folder = Callable[..., Path]
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture
def saved(source_of: Callable[..., StoredModel], tmp_path: Path) -> Folder:
    """Return a function from family and config fields to a copy of the saved tiny model that a test may change."""

    def folder(family: str = "llama", **fields: Any) -> Path:
        return Path(shutil.copytree(source_of(family, **fields).folder, tmp_path / "model"))

    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=IDS)
    result: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result


def reference(folder: Path) -> torch.Tensor:
    """Return the logits, or an encoder's hidden states, of the model as transformers loads it."""
    auto = (
        AutoModel
        if json.loads((folder / "config.json").read_text())["model_type"] == "bert"
        else AutoModelForCausalLM
    )
    return logits(auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval())


def assert_same(folder: Path, expected: torch.Tensor | None = None) -> StoredModel:
    source = open_source(folder)
    expected = reference(folder) if expected is None else expected
    assert float((logits(source.load()) - expected).abs().max() / expected.abs().max()) < 1e-5
    return source


def refusal(folder: Path, load: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        open_source(folder).load() if load else open_source(folder)
    assert caught.value.where
    assert caught.value.fix
    return str(caught.value)


# --- ties

TIED = ["llama", "gemma2", "gpt2", "opt", "starcoder2", "mixtral"]


@pytest.mark.parametrize("family", TIED)
def test_a_stored_head_wins_over_the_tie(saved: Folder, family: str) -> None:
    folder = with_head(saved(family, tie_word_embeddings=True), family, 0.3)
    before = reference(folder)
    source = assert_same(folder)
    assert source.config.tie_word_embeddings is False
    assert "config.json ties lm_head.weight" in source.notices[0]
    assert_same(folder, before)
    prepared = source.then(Prepared(source.description, ["fold", "rotate"])) if family == "llama" else source
    assert float((logits(prepared.load()) - before).abs().max() / before.abs().max()) < 1e-4


@pytest.mark.parametrize("family", TIED)
def test_an_equal_stored_head_stays_tied(saved: Folder, family: str) -> None:
    folder = saved(family, tie_word_embeddings=True)
    plain = open_source(folder)
    source = assert_same(with_head(folder, family, 0.0))
    assert (source.config.tie_word_embeddings, source.notices) == (True, ())
    assert source.structure() == plain.structure()
    assert source.parameter_count() == plain.parameter_count()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_tied_model_may_store_the_head_alone(saved: Folder, family: str) -> None:
    folder = saved(family, tie_word_embeddings=True)
    embedding = EMBEDDING.get(family, "model.embed_tokens.weight")
    edit_tensors(folder, lambda tensors: {"lm_head.weight": tensors.pop(embedding), **tensors})
    assert assert_same(folder).config.tie_word_embeddings is True


@pytest.mark.whole
def test_a_tied_head_of_another_kind_reaches_the_graph(
    cli: Cli, llama: Path, tmp_path: Path, tolerance: dict[str, float]
) -> None:
    """The kind of model that was exported tied: adapters merged, with a trained head."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    edit_config(folder, tie_word_embeddings=True)
    ended = cli("export", folder, "-o", tmp_path / "out", "--threads", 1)
    assert ended.code == 0, ended.err
    assert "config.json ties lm_head.weight" in ended.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "exported untied" in json.loads((tmp_path / "out" / "report.json").read_text())["notices"][0]
    got = Session.from_pretrained(tmp_path / "out", threads=1).prefill_logits(IDS.numpy().astype(np.int64))
    expected = reference(folder).numpy()
    assert np.abs(got - expected).max() / np.abs(expected).max() < tolerance["fp32"]


def test_an_untied_model_needs_its_head(saved: Folder) -> None:
    folder = saved(tie_word_embeddings=False)
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    assert "no output projection" in refusal(folder)


# --- names


NAMES: dict[str, Edit] = {
    "torch.compile": prefixed("_orig_mod."),
    "peft": prefixed("base_model.model."),
    "multimodal, old": prefixed("language_model."),
    "multimodal, new": multimodal,
    "data parallel": prefixed("module."),
    "lightning": prefixed("model."),
    "two at once": prefixed("module._orig_mod."),
    "compiled layers": inside("_orig_mod"),
    "FSDP layers": inside("_fsdp_wrapped_module"),
    "checkpointed layers": inside("_checkpoint_wrapped_module"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_prefixes_and_wrappers_go(saved: Folder, family: str, kind: str) -> None:
    folder = saved(family)
    expected = reference(folder)
    plain = open_source(folder).structure()
    edit_tensors(folder, NAMES[kind])
    source = assert_same(folder, expected)
    assert source.structure() == plain
    assert "are read without" in source.notices[0]


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "phi3"])
def test_a_prefix_goes_in_every_family(saved: Folder, family: str) -> None:
    folder = saved(family)
    expected = reference(folder)
    edit_tensors(folder, prefixed("net.student."))
    assert_same(folder, expected)


def test_two_models_in_one_checkpoint_are_refused(saved: Folder) -> None:
    folder = saved("bert")
    edit_tensors(folder, lambda tensors: prefixed("query.")(tensors) | prefixed("passage.")(tensors))
    assert "more than one model of this kind: passage. and query." in refusal(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_backbone_without_a_head(saved: Folder, family: str) -> None:
    """A tied backbone is the whole model; an untied one has lost its output projection."""
    folder = saved(family, tie_word_embeddings=True)
    expected = reference(folder)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert not any(
        name.startswith(("model.", "transformer.")) for name in load_file(folder / "model.safetensors")
    )
    assert (
        "without a head: its output projection is the embedding" in assert_same(folder, expected).notices[0]
    )
    edit_config(folder, tie_word_embeddings=False)
    assert "no output projection" in refusal(folder)


def test_old_names_of_berts_norms_and_its_pretraining_head(saved: Folder) -> None:
    folder = saved("bert")
    expected = reference(folder)

    def old(tensors: Tensors) -> Tensors:
        names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma") for name in tensors}
        names = {name: old.replace("LayerNorm.bias", "LayerNorm.beta") for name, old in names.items()}
        head = {
            "cls.predictions.bias": torch.zeros(160),
            "bert.embeddings.position_ids": torch.arange(128)[None],
        }
        return {f"bert.{names[name]}": tensor for name, tensor in tensors.items()} | head

    edit_tensors(folder, old)
    source = assert_same(folder, expected)
    assert "pretraining head (1 tensors, cls.*)" in source.notices[0]


@pytest.mark.parametrize(
    ("family", "name", "tensor"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 128, 128, dtype=torch.uint8)),
        ("gpt2", "transformer.h.1.attn.masked_bias", torch.tensor(-1e4)),
        ("bert", "embeddings.position_ids", torch.arange(128)[None]),
    ],
)
def test_old_buffers_are_harmless(saved: Folder, family: str, name: str, tensor: torch.Tensor) -> None:
    folder = saved(family)
    plain = open_source(folder).structure()
    edit_tensors(folder, lambda tensors: {**tensors, name: tensor})
    source = assert_same(folder)
    assert (source.structure(), source.notices) == (plain, ())


# --- what is left over, and what is missing


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("score.weight", "a head of another kind (classification, reward, question answering): score.weight"),
        ("classifier.weight", "a head of another kind"),
        ("v_head.summary.weight", "a head of another kind"),
        ("model.qa_outputs.bias", "a head of another kind"),
        ("model.layers.2.mlp.up_proj.weight", "the files hold 3 layers, config.json says 2"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "an adapter that is not merged"),
        ("model.layers.0.mlp.up_proj.qweight", "tensors of a quantized model"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "tensors of a quantized model"),
        ("model.layers.0.self_attn.q_proj.bias", "1 tensors have no place in a llama model"),
        ("model.layers.0.self_attn.q_norm.weight", "1 tensors have no place in a llama model"),
        ("lm_head.bias", "1 tensors have no place in a llama model"),
        ("vision_tower.blocks.0.weight", "1 tensors have no place in a llama model"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_tensor_without_a_place_is_named(saved: Folder, family: str, name: str, what: str) -> None:
    folder = saved(family)
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.ones(4)})
    message = refusal(folder)
    assert what.replace("llama", family) in message
    assert name in message


@pytest.mark.parametrize("leaf", ["w1", "w2", "w3"])
def test_experts_that_are_not_all_there_are_refused(saved: Folder, leaf: str) -> None:
    folder = saved("mixtral")

    def without(gone: str) -> Edit:
        return lambda tensors: {
            name: t for name, t in tensors.items() if gone not in name or leaf not in name
        }

    edit_tensors(folder, without("layers.1.block_sparse_moe.experts.3."))
    message = refusal(folder)
    assert "3 of the 4 tensors of model.layers.1.mlp.experts." in message
    assert f"experts.0.{leaf}.weight" in message
    edit_tensors(folder, without("layers.1.block_sparse_moe.experts."))
    assert "model.layers.1.mlp.experts." in refusal(folder)


def test_an_expert_of_another_shape_is_refused(saved: Folder) -> None:
    folder = saved("qwen3_moe")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.zeros(3, 3)})
    assert refusal(folder).startswith(f"{name}: it has shape [3, 3]")


def test_a_file_without_tensors_is_refused(saved: Folder) -> None:
    folder = saved()
    save_file({}, folder / "model.safetensors")
    assert "holds no tensor" in refusal(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_scalar_in_place_of_a_tensor_is_refused(saved: Folder, name: str) -> None:
    folder = saved()
    edit_tensors(folder, lambda tensors: {**tensors, name: torch.tensor(1.0)})
    assert refusal(folder).startswith(f"{name}: it has shape []")


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaForTokenClassification"),
        ("qwen2", "Qwen2ForProcessRewardModel"),
        ("llama", "LlavaForConditionalGeneration"),
        ("bert", "BertForQuestionAnswering"),
    ],
)
def test_a_model_of_another_kind_is_refused(saved: Folder, family: str, architecture: str) -> None:
    folder = saved(family)
    edit_config(folder, architectures=[architecture])
    assert f"the model is a {architecture}" in refusal(folder)


@pytest.mark.parametrize(
    "architectures", [None, [], "LlamaForCausalLM", ["LlamaModel"], ["MyLlamaForCausalLM"]]
)
def test_other_names_of_the_same_kind_are_read(saved: Folder, architectures: list[str] | str | None) -> None:
    folder = saved()
    expected = reference(folder)
    edit_config(folder, architectures=architectures)
    assert_same(folder, expected)


def test_a_vocabulary_that_was_resized(saved: Folder) -> None:
    folder = saved(tie_word_embeddings=False)
    grow = lambda tensor: torch.cat([tensor, tensor[:8]])  # noqa: E731 (one use, in one line)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_tensors(folder, lambda tensors: {**tensors, **{name: grow(tensors[name]) for name in names}})
    message = refusal(folder)
    assert "[168, 64]" in message
    assert "set vocab_size to 168" in message


# --- types


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_every_float_type_is_read(saved: Folder, kind: torch.dtype) -> None:
    folder = saved()
    edit_tensors(folder, lambda tensors: {name: tensor.to(kind) for name, tensor in tensors.items()})
    assert_same(folder)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_numbers_without_scales_are_refused(saved: Folder, kind: torch.dtype) -> None:
    folder = saved()
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: {**tensors, name: tensors[name].to(kind)})
    message = refusal(folder)
    assert f"tensor {name!r} is stored as" in message
    assert "no scales" in message


# --- files


@pytest.mark.parametrize(("stem", "first"), [("model", 1), ("pytorch_model", 1), ("model", 0)])
def test_shards_without_an_index_are_read(saved: Folder, stem: str, first: int) -> None:
    folder = saved()
    expected = reference(folder)
    paths = sharded(folder, stem=stem, first=first)
    assert_same(folder, expected)
    paths[1].unlink()
    message = refusal(folder)
    assert message.startswith(str(paths[1]))
    assert f"shard {first + 1} of 3 is missing" in message


def test_two_sets_of_shards_are_refused(saved: Folder) -> None:
    folder = saved()
    for path in sharded(folder):
        shutil.copy(path, folder / path.name.replace("model", "ema"))
    assert "two sets of shards" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "weights.safetensors"])
def test_one_file_of_another_name_is_read(saved: Folder, name: str) -> None:
    folder = saved()
    expected = reference(folder)
    (folder / "model.safetensors").rename(folder / name)
    assert_same(folder, expected)
    shutil.copy(folder / name, folder / "other.safetensors")
    assert "2 safetensors files" in refusal(folder)


def test_the_file_that_the_config_names_is_read(saved: Folder) -> None:
    folder = saved()
    expected = reference(folder)
    (folder / "model.safetensors").rename(folder / "chosen.safetensors")
    tiny_model("llama", seed=7).save_pretrained(folder / "other")
    shutil.move(folder / "other" / "model.safetensors", folder)
    edit_config(folder, transformers_weights="chosen.safetensors")
    assert_same(folder, expected)
    assert_same(folder)
    edit_config(folder, transformers_weights="absent.safetensors.index.json")
    assert "absent.safetensors.index.json: is missing" in refusal(folder)
    edit_config(folder, transformers_weights="../model.safetensors")
    assert "transformers_weights is '../model.safetensors'" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(saved: Folder) -> None:
    folder = saved()
    first, second, _ = sharded(folder)
    save_file({**load_file(first), **load_file(second)}, first)
    assert "lies in two files" in refusal(folder)


def test_one_file_wins_over_an_index_as_in_transformers(
    saved: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved()
    tiny_model("llama", seed=7).save_pretrained(folder / "other", max_shard_size="100KB")
    for path in (folder / "other").glob("model*"):
        shutil.move(path, folder)
    assert_same(folder)
    assert "not read: model-00001-of" in caplog.text


def test_mistrals_own_file_is_passed_over_and_not_enough(
    saved: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved("mistral")
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert_same(folder)
    assert "not read: consolidated.safetensors" in caplog.text
    (folder / "model.safetensors").unlink()
    assert "Mistral's own format" in refusal(folder)


def test_folders_of_other_tools_say_what_they_are(saved: Folder) -> None:
    folder = saved()
    edit_config(folder, quantization={"group_size": 64, "bits": 4})
    assert "an MLX checkpoint (mlx_lm), quantized to 4 bits in groups of 64" in refusal(folder)


def test_packed_tensors_of_mlx_are_recognized(saved: Folder) -> None:
    folder = saved()
    stem = "model.layers.0.mlp.up_proj"
    packed = {
        f"{stem}.weight": torch.zeros(128, 8, dtype=torch.uint32),
        f"{stem}.scales": torch.zeros(128, 1),
        f"{stem}.biases": torch.zeros(128, 1),
    }
    edit_tensors(folder, lambda tensors: tensors | packed)
    assert "an MLX checkpoint" in refusal(folder)


def test_an_adapter_without_its_config_or_base(saved: Folder, tmp_path: Path) -> None:
    folder = saved()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "only adapter_model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "without adapter_config.json" in refusal(folder)


def test_a_folder_with_gguf_files_only(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"not a model " * 100)
    assert "a folder with 2 GGUF files: a.gguf, b.gguf" in refusal(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert refusal(tmp_path).startswith(str(tmp_path / "a.gguf"))


def test_gguf_beside_a_config(saved: Folder) -> None:
    folder = saved()
    (folder / "model.safetensors").rename(folder / "a.gguf")
    assert f"name the file: {folder / 'a.gguf'}" in refusal(folder)
