"""GGUF input: numbers and encodings come out as they went in, once per content, and nothing is left over."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import finish, interleaved, model_for_gguf, write_gguf
from safetensors.torch import load_file
from transformers import AutoConfig

from rk_export.errors import UnsupportedModelError
from rk_export.source.gguf.convert import gguf_to_folder
from rk_export.source.gguf.rotary import llama3_divisors
from rk_export.source.gguf.tensors import rotary_halves


def test_config_states_short_decimals_and_token_ids(tmp_path: Path) -> None:
    model = model_for_gguf(
        "llama", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model), tmp_path)
    config = json.loads((folder / "config.json").read_text())

    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 1e5
    assert (config["bos_token_id"], config["eos_token_id"], config.get("pad_token_id")) == (0, 1, None)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


@pytest.mark.parametrize(("turn", "stops"), [(5, [1, 5]), (1, 1)])
def test_generation_stops_at_the_end_of_a_turn_too(tmp_path: Path, turn: int, stops: int | list[int]) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_for_gguf("llama"),
        extend=lambda writer: writer.add_eot_token_id(turn),
    )
    folder = gguf_to_folder(path, tmp_path)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == stops


def test_quantized_blocks_are_dequantized_to_float32(tmp_path: Path) -> None:
    model = model_for_gguf("qwen2")
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model, quantize=True), tmp_path)
    weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]

    original = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(original, kind), kind)
    assert weight.dtype == torch.float32
    np.testing.assert_array_equal(weight.numpy(), expected)
    assert not np.array_equal(weight.numpy(), original)


def test_half_precision_files_stay_half(tmp_path: Path) -> None:
    model = model_for_gguf("qwen2", tie_word_embeddings=True)
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
    finish(writer)


def test_llama3_rotary_scaling_is_recovered_from_its_tensor(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = model_for_gguf("llama", head_dim=64, rope_parameters=scaling)
    plain = model_for_gguf(
        "llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    divisors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    np.testing.assert_allclose(llama3_divisors(500000.0, 64, 8.0), divisors, rtol=1e-5)

    model = model_for_gguf("llama", head_dim=16, rope_parameters=scaling)
    divisors = llama3_divisors(500000.0, 16, 8.0).astype(np.float32)
    path = write_gguf(tmp_path / "a.gguf", model, tensors={"rope_freqs.weight": divisors})
    assert AutoConfig.from_pretrained(gguf_to_folder(path, tmp_path)).rope_parameters == scaling

    wrong = write_gguf(tmp_path / "b.gguf", model, tensors={"rope_freqs.weight": divisors**2})
    with pytest.raises(UnsupportedModelError, match="not those of Llama 3"):
        gguf_to_folder(wrong, tmp_path)


def test_the_folder_is_made_once_per_content(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"))
    first = gguf_to_folder(path, tmp_path / "cache")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert gguf_to_folder(path, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp

    write_gguf(path, model_for_gguf("llama", intermediate_size=96))
    assert gguf_to_folder(path, tmp_path / "cache") != first


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.zeros(64, dtype=np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), tensors=bias)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q\.bias"):
        gguf_to_folder(path, tmp_path / "cache")


def test_rotary_halves_undoes_the_interleaving() -> None:
    W = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)
    np.testing.assert_array_equal(rotary_halves(interleaved(W, 4), 4), W)
    assert not np.array_equal(interleaved(W, 4), W)
