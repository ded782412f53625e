"""Files of a folder that are not what they should be: values that no model has, pages and pointers in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import edit_config
from conftest import Cli
from tiny_models import family_of

from rk_export.errors import InputError, RkExportError
from rk_export.graph.dense.frontend import check_supported
from rk_export.model.description import describe
from rk_export.source.stored import open_source, read_config


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_act": "bogus"}, "'bogus' in hidden_act"),
        ({"rope_parameters": {"rope_type": "new", "rope_theta": 1e4}}, "'new' in rope_parameters"),
        ({"rope_scaling": {"type": "su", "factor": 4.0}}, "'su' in rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_theta": "x"}}, "TypeError"),
        ({"rope_parameters": "x"}, "Field 'rope_parameters' with value 'x'"),
        ({"pad_token_id": 1000}, "Padding_idx must be within"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"hidden_size": 63}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"num_attention_heads": "four"}, "expected int, got str"),
        ({"rms_norm_eps": None}, "expected float, got NoneType"),
    ],
)
def test_a_value_that_no_model_can_have(
    llama: Path, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    edit_config(folder, **values)
    with pytest.raises(InputError) as caught:
        open_source(folder)
    assert reason in caught.value.what
    assert str(caught.value.where).endswith("config.json")
    assert caught.value.fix


_WIDE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}


@pytest.mark.parametrize(
    ("family", "values", "field"),
    [
        ("cohere", {"logit_scale": None}, "logit_scale"),
        ("cohere", {"layer_norm_eps": None}, "layer_norm_eps"),
        ("falcon", {"layer_norm_epsilon": None}, "layer_norm_epsilon"),
        ("falcon:new", {"num_kv_heads": 0}, "num_kv_heads"),
        ("falcon:new", {"num_kv_heads": -1}, "num_kv_heads"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling"),
        ("granitemoe", {"attention_multiplier": 0}, "attention_multiplier"),
        ("granitemoe", {"residual_multiplier": None}, "residual_multiplier"),
        ("granitemoe", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("granitemoeshared", {"attention_multiplier": 0.0}, "attention_multiplier"),
        ("ernie4_5_moe", {"moe_k": None}, "moe_k"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "llama_4_scaling_beta",
        ),
        ("bloom", {"seq_length": "x"}, "seq_length"),
        ("ministral", {"sliding_window": 0}, "sliding_window"),
        ("phimoe", {"sliding_window": -1}, "sliding_window"),
        ("lfm2", {"conv_L_cache": 0}, "conv_L_cache"),
        ("gptj", {"rotary_dim": 7}, "rotary_dim"),
        ("gptj", {"rotary_dim": 1024}, "rotary_dim"),
        ("phi", {"rope_parameters": _WIDE}, "partial_rotary_factor"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
        ("mpt", {"hidden_size": 3}, "hidden_size"),
    ],
)
def test_a_value_that_only_the_family_reads(
    tmp_path: Path, family: str, values: dict[str, Any], field: str
) -> None:
    name, _, variant = family.partition(":")
    entry = family_of(name)
    stated = {"model_type": entry.model_type or name, **entry.config_fields(variant), **values}
    (tmp_path / "config.json").write_text(json.dumps(stated), "utf-8")
    with pytest.raises(RkExportError) as caught:
        check_supported(describe(read_config(tmp_path)), ep="cpu", dtype="fp32")
    assert field in str(caught.value)
    assert "config.json" in str(caught.value.where)


def test_the_command_line_ends_with_a_message(cli: Cli, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    edit_config(folder, hidden_act="bogus")
    for command in (("export", folder), ("compress", folder), ("compress", folder, "--dry-run")):
        ended = cli(*command, "-o", tmp_path / "out")
        assert (ended.code, ended.out) == (2, "")
        assert "'bogus' in hidden_act is nothing that it knows" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><title>Not found</title>", "a web page"),
        (b"\n<html lang=en>", "a web page"),
    ],
    ids=["pointer", "page", "page without a type"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_was_downloaded_in_place_of_a_file_is_named(
    llama: Path, tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_source(folder)
    assert str(caught.value).startswith(f"{folder / name}: is {kind}\n")
    assert caught.value.fix == "download the file itself"
