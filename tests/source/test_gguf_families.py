"""Every family that GGUF is read for: weights, config and logits equal those of the model it was written from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import Q8_0, largest_error, model_for_gguf, write_gguf
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.source.gguf.convert import gguf_to_folder
from rk_export.source.stored import open_source

pytestmark = pytest.mark.slow

# What no file states, and what is stated for the tokenizer.
UNSTATED = {"architectures", "dtype", "_name_or_path", "transformers_version", "unk_token_id", "head_dim"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
# Gemma 3's pattern, six layers of a window of 5 with one full layer, and no window at all.
GEMMA3 = {"layer_types": None, "num_hidden_layers": 7, "query_pre_attn_scalar": 32}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": YARN}),
    "qwen2, YaRN, bounds": ("qwen2", {"rope_parameters": YARN | {"beta_fast": 20.0, "beta_slow": 2.0}}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, YaRN": ("qwen3", {"rope_parameters": YARN, "max_position_embeddings": 32}),
    "qwen3moe": ("qwen3_moe", {}),
    "qwen3moe, YaRN": ("qwen3_moe", {"rope_parameters": YARN}),
    "mixtral": ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3", GEMMA3),
    "gemma3, linear": (
        "gemma3",
        GEMMA3 | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
    ),
    "gemma3 without a window": (
        "gemma3",
        {"layer_types": ["full_attention"] * 4, "sliding_window": 128, "query_pre_attn_scalar": 32},
    ),
    "gemma3 with a cap": ("gemma3", GEMMA3 | {"final_logit_softcapping": 3.0}),
    "granite": ("granite", {}),
    "granite, tied": ("granite", {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": None}),
    "phi3": ("phi3", {"sliding_window": None}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}


def converted(path: Path, cache: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf_to_folder(path, cache), dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_is_the_one_that_was_written(tmp_path: Path, case: str) -> None:
    family, changes = CASES[case]
    original = model_for_gguf(family, **changes)
    model = converted(write_gguf(tmp_path / "tiny.gguf", original), tmp_path / "cache")

    expected = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-7)  # 1 + w rounds in float32
    stated, found = original.config.to_dict(), model.config.to_dict()
    assert {key: found[key] for key in stated.keys() - UNSTATED} == {
        key: stated[key] for key in stated.keys() - UNSTATED
    }
    assert largest_error(model, original) < 1e-5


@pytest.mark.parametrize("case", ["gemma3, linear", "granite", "qwen3moe, YaRN", "mixtral", "smollm3"])
def test_our_loader_reads_the_converted_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    family, changes = CASES[case]
    original = model_for_gguf(family, **changes)
    monkeypatch.setattr("rk_export.source.gguf.convert.CACHE", tmp_path / "cache")
    path = write_gguf(tmp_path / "tiny.gguf", original)
    source = open_source(path.rename(tmp_path / "sha256-0123"))  # a file is known by how it begins
    assert largest_error(source.load(), original) < 1e-5


def longrope_file(path: Path, model: PreTrainedModel, **changes: Any) -> Path:
    rotary = model.config.rope_parameters
    scale = changes.pop("scale", None)

    def extend(writer: Any) -> None:
        writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
        if scale is not None:
            writer.add_rope_scaling_attn_factors(scale)

    factors = {
        f"rope_factors_{length}.weight": np.array(rotary[f"{length}_factor"], dtype=np.float32)
        for length in ("long", "short")
    }
    return write_gguf(path, model, extend=extend, tensors=factors | changes)


@pytest.mark.parametrize("tokens", [24, 64])  # below and above the original context of 32
@pytest.mark.parametrize("scale", [None, 1.25])
def test_longrope_is_read_from_its_two_tensors(tmp_path: Path, tokens: int, scale: float | None) -> None:
    rotary = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35],
        "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
        "original_max_position_embeddings": 32,
    }
    if scale is not None:
        rotary["attention_factor"] = scale
    original = model_for_gguf("phi3", rope_parameters=rotary, sliding_window=None)
    model = converted(longrope_file(tmp_path / "tiny.gguf", original, scale=scale), tmp_path / "cache")

    found = model.config.rope_parameters
    assert {key: found[key] for key in rotary} == rotary
    assert largest_error(model, original, tokens) < 1e-5


def test_longrope_with_a_wrong_tensor_is_refused(tmp_path: Path) -> None:
    rotary = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0] * 8,
        "original_max_position_embeddings": 32,
    }
    original = model_for_gguf("phi3", rope_parameters=rotary, sliding_window=None)
    short = {"rope_factors_long.weight": np.ones(3, dtype=np.float32)}
    path = longrope_file(tmp_path / "tiny.gguf", original, **short)
    with pytest.raises(InputError, match=r"rope_factors_long\.weight has shape \(3,\), not \(8,\)"):
        gguf_to_folder(path, tmp_path)


def with_yarn(path: Path, name: str, value: float) -> Path:
    model = model_for_gguf("qwen2", rope_parameters=YARN)
    return write_gguf(
        path, model, extend=lambda writer: writer.add_float32(f"qwen2.rope.scaling.{name}", value)
    )


@pytest.mark.parametrize("name", ["yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"])
def test_yarn_that_llama_cpp_and_transformers_read_differently_is_refused(tmp_path: Path, name: str) -> None:
    path = with_yarn(tmp_path / "tiny.gguf", name, 0.5)
    with pytest.raises(UnsupportedModelError, match=rf"YaRN with {name} 0\.5(?s:.)*Hugging Face checkpoint"):
        gguf_to_folder(path, tmp_path)


@pytest.mark.parametrize("value", [1.0, 1.0 + 0.1 * math.log(4.0)])
def test_yarn_whose_factor_changes_nothing_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    folder = gguf_to_folder(with_yarn(tmp_path / "tiny.gguf", "yarn_attn_factor", value), tmp_path)
    assert AutoConfig.from_pretrained(folder).rope_parameters == YARN
    assert ("scaled by 1.1386 all the same" in caplog.text) == (value == 1.0)


def test_a_further_factor_of_the_rotation_is_multiplied_on(tmp_path: Path) -> None:
    folder = gguf_to_folder(with_yarn(tmp_path / "tiny.gguf", "attn_factor", 0.5), tmp_path)
    factor = AutoConfig.from_pretrained(folder).rope_parameters["attention_factor"]
    assert factor == pytest.approx(0.5 * (1.0 + 0.1 * math.log(4.0)))


@pytest.mark.parametrize("rotary", [YARN, LINEAR])
def test_a_rotation_scaled_twice_is_refused(tmp_path: Path, rotary: dict[str, Any]) -> None:
    model = model_for_gguf("llama", rope_parameters=rotary)
    path = write_gguf(
        tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    )
    with pytest.raises(UnsupportedModelError, match=r"more than one way: rope_freqs\.weight, rope\.scaling"):
        gguf_to_folder(path, tmp_path)


def test_a_factor_on_an_ordinary_rotation_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_for_gguf("llama"),
        extend=lambda writer: writer.add_rope_scaling_attn_factors(1.5),
    )
    with pytest.raises(UnsupportedModelError, match=r"scaled by 1\.5 without YaRN"):
        gguf_to_folder(path, tmp_path)


def test_an_unknown_scaling_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_for_gguf("qwen2"),
        extend=lambda writer: writer.add_string("qwen2.rope.scaling.type", "dynamic"),
    )
    with pytest.raises(UnsupportedModelError, match="rotary scaling 'dynamic'"):
        gguf_to_folder(path, tmp_path)


@pytest.mark.parametrize(
    ("family", "layers", "scale"),
    [("gemma3", 62, 16), ("gemma3", 61, 32), ("gemma2", 46, 16), ("gemma2", 45, 32)],
)
def test_gemmas_largest_model_has_another_attention_scale(
    tmp_path: Path, family: str, layers: int, scale: int
) -> None:
    model = model_for_gguf(
        family, num_hidden_layers=layers, layer_types=None, hidden_size=64, intermediate_size=16
    )
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model), tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert config.query_pre_attn_scalar == scale  # 64 / 4 heads, or the head's width
    assert config.layer_types == model.config.layer_types


@pytest.mark.parametrize(
    ("pattern", "full"), [(2, [1, 3]), (3, [2]), ([True, False, False, True], [1, 2]), (0, [])]
)
def test_gemma3s_pattern_of_windows_is_read_when_stated(
    tmp_path: Path, pattern: int | list[bool], full: list[int]
) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_for_gguf("gemma3"),
        extend=lambda writer: writer.add_sliding_window_pattern(pattern),
    )
    types = AutoConfig.from_pretrained(gguf_to_folder(path, tmp_path)).layer_types
    assert [index for index, kind in enumerate(types) if kind == "full_attention"] == full


def test_quantized_experts_are_dequantized_one_by_one(tmp_path: Path) -> None:
    original = model_for_gguf("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    path = write_gguf(tmp_path / "tiny.gguf", original, quantize=True)
    weights = load_file(gguf_to_folder(path, tmp_path) / "model.safetensors")

    stacked = original.model.layers[1].mlp.experts.gate_up_proj.detach().numpy()
    for name, rows in (("gate_proj", slice(0, 64)), ("up_proj", slice(64, 128))):
        expected = gguf.dequantize(gguf.quantize(np.ascontiguousarray(stacked[2, rows]), Q8_0), Q8_0)
        found = weights[f"model.layers.1.mlp.experts.2.{name}.weight"].numpy()
        np.testing.assert_array_equal(found, expected)


def test_what_a_file_states_and_nobody_reads_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_for_gguf("llama"),
        extend=lambda writer: writer.add_float32("llama.attention.temperature", 0.5),
    )
    gguf_to_folder(path, tmp_path)
    assert "not read, and not known to change what it computes: attention.temperature = 0.5" in caplog.text


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("granite", "granite.rope.scaling.finetuned", False, "rotates no positions"),
        ("olmo2", "olmo2.attention.sliding_window", 8, "Olmo 3"),
        ("llama", "llama.attention.causal", False, "both directions"),
        ("qwen3_moe", "qwen3moe.expert_gating_func", 2, "a router with expert_gating_func 2"),
        ("mixtral", "llama.expert_gating_func", 2, "a router with expert_gating_func 2"),
    ],
)
def test_a_model_of_another_kind_in_a_known_architecture_is_refused(
    tmp_path: Path, family: str, key: str, value: bool | int, message: str
) -> None:
    def extend(writer: Any) -> None:
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(key, value)

    path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf(family), extend=extend)
    with pytest.raises(UnsupportedModelError, match=message):
        gguf_to_folder(path, tmp_path)


def test_a_missing_stack_of_experts_is_named(tmp_path: Path) -> None:
    model = model_for_gguf("qwen3_moe")
    path = write_gguf(tmp_path / "tiny.gguf", model, without="blk.1.ffn_up_exps.weight")
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up_exps\.weight \(model.layers.1.mlp.experts"):
        gguf_to_folder(path, tmp_path)
