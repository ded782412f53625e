"""GGUF input: weights, config and tokenizer equal those of the model that the file was written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.gguf import gguf_to_folder
from rk_export.gguf_tensors import rotary_halves
from rk_export.gguf_rotary import llama3_divisors

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VOCABULARY = [
    "<s>",
    "</s>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    "12",
    "he",
    "ll",
    "hell",
    "hello",
    "20",
]
MERGES = ["1 2", "h e", "l l", "he ll", "hell o", "2 0"]


def tiny_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(VOCABULARY), **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms too, so that an offset or a permutation shows
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def interleaved(W: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k."""
    return W.reshape(heads, 2, -1, W.shape[-1]).swapaxes(1, 2).reshape(W.shape)


def stored(family: str, name: str, values: np.ndarray) -> np.ndarray:
    if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return interleaved(values, 4 if "q_proj" in name else 2)
    return values + 1 if family == "gemma2" and name.endswith("norm.weight") else values


def write_gguf(path: Path, model: Any, *, rule: str = "smollm", quantize: bool = False, **extra: Any) -> Path:
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family in ("qwen3", "gemma2"):
        writer.add_key_length(config.head_dim)
    if family == "gemma2":
        writer.add_sliding_window(config.sliding_window)
    add_tokenizer(writer, rule)
    table = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family), config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        values = stored(family, name, parameter.detach().numpy())
        kind = gguf.GGMLQuantizationType.F32
        if quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quantize(values, kind)
        writer.add_tensor(f"{table.get_name(stem)}.{suffix}", np.ascontiguousarray(values), raw_dtype=kind)
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any, rule: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, *[1] * (len(VOCABULARY) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
        ("phi3", {}),
        ("starcoder2", {"sliding_window": None}),
    ],
)
def test_a_converted_model_computes_what_the_original_does(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family, **changes)
    path = write_gguf(tmp_path / "tiny.gguf", model)

    folder = gguf_to_folder(path, tmp_path / "cache")
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    expected = dict(model.named_parameters())
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-7)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_config_states_short_decimals_and_token_ids(tmp_path: Path) -> None:
    model = tiny_model(
        "llama", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model), tmp_path)
    config = json.loads((folder / "config.json").read_text())

    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 1e5
    assert (config["bos_token_id"], config["eos_token_id"], config.get("pad_token_id")) == (0, 1, None)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


def test_quantized_blocks_are_dequantized_to_float32(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model, quantize=True), tmp_path)
    weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]

    original = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(original, kind), kind)
    assert weight.dtype == torch.float32
    np.testing.assert_array_equal(weight.numpy(), expected)
    assert not np.array_equal(weight.numpy(), original)


def test_half_precision_files_stay_half(tmp_path: Path) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "single.gguf", model)
    half = tmp_path / "half.gguf"
    rewrite_in_half(path, half)

    weights = load_file(gguf_to_folder(half, tmp_path) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def rewrite_in_half(path: Path, target: Path) -> None:
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "qwen2")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        writer.add_tensor(tensor.name, values.astype(np.float16) if values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("smollm", ["hello", "Ġ", "2", "0", "1", "2"]),
        ("gpt-2", ["hello", "Ġ", "20", "12"]),
        ("llama-bpe", ["hello", "Ġ", "20", "1", "2"]),
        ("qwen2", ["hello", "Ġ", "2", "0", "1", "2"]),
    ],
)
def test_digits_are_split_as_the_rule_says(tmp_path: Path, rule: str, pieces: list[str]) -> None:
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), rule=rule), tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    assert tokenizer.encode("hello 2012").tokens == pieces
    assert tokenizer.decode(tokenizer.encode("hello 2012").ids) == "hello 2012"
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 128


def test_an_unknown_splitting_rule_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), rule="martian")
    with pytest.raises(UnsupportedModelError, match="splitting rule 'martian'"):
        gguf_to_folder(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_llama3_rotary_scaling_is_recovered_from_its_tensor(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", head_dim=64, rope_parameters=scaling)
    plain = tiny_model("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    np.testing.assert_allclose(llama3_divisors(500000.0, 64, 8.0), divisors, rtol=1e-5)

    model = tiny_model("llama", head_dim=16, rope_parameters=scaling)
    divisors = llama3_divisors(500000.0, 16, 8.0).astype(np.float32)
    folder = gguf_to_folder(write_gguf(tmp_path / "a.gguf", model, rope_freqs__weight=divisors), tmp_path)
    assert AutoConfig.from_pretrained(folder).rope_parameters == scaling

    wrong = write_gguf(tmp_path / "b.gguf", model, rope_freqs__weight=divisors**2)
    with pytest.raises(UnsupportedModelError, match="not those of Llama 3"):
        gguf_to_folder(wrong, tmp_path)


def test_the_folder_is_made_once_per_content(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    first = gguf_to_folder(path, tmp_path / "cache")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert gguf_to_folder(path, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp

    write_gguf(path, tiny_model("llama", intermediate_size=128))
    assert gguf_to_folder(path, tmp_path / "cache") != first


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    bias = np.zeros(64, dtype=np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), blk__0__attn_q__bias=bias)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q\.bias"):
        gguf_to_folder(path, tmp_path / "cache")


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    content = path.read_bytes()
    for share in (0.05, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError, match="truncated or damaged"):
            gguf_to_folder(path, tmp_path / "cache")
    path.write_bytes(b"PK\x03\x04" + content)
    with pytest.raises(InputError, match="not a GGUF file"):
        gguf_to_folder(path)
    with pytest.raises(InputError, match="no such file"):
        gguf_to_folder(tmp_path / "absent.gguf")


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "rwkv.gguf", "rwkv6")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"'rwkv6'(?s:.)*llama"):
        gguf_to_folder(tmp_path / "rwkv.gguf")


def test_rotary_halves_undoes_the_interleaving() -> None:
    W = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)
    np.testing.assert_array_equal(rotary_halves(interleaved(W, 4), 4), W)
    assert not np.array_equal(interleaved(W, 4), W)
