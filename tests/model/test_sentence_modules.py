"""``modules.json`` as sentence-transformers writes it in several versions, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentence_models import write_modules
from transformers import BertConfig

from rk_export.errors import InputError, RkExportError, UnsupportedModelError
from rk_export.model.sentence_modules import Dense, Normalize, module_folders, read_sentence_modules
from rk_export.source.sentence_head import copy_sentence_files, read_sentence_head

CONFIG = BertConfig(hidden_size=16, num_attention_heads=2)


def refusal(folder: Path) -> str:
    with pytest.raises(RkExportError) as error:
        read_sentence_head(folder, CONFIG)
    assert "modules.json" in str(error.value.fix) or isinstance(error.value, InputError)
    return str(error.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_a_folder_without_modules_says_nothing(tmp_path: Path) -> None:
    assert read_sentence_modules(tmp_path, CONFIG) is None


@pytest.mark.parametrize("kind", ["sentence_transformers.models", "sentence_transformers.base.modules.any"])
def test_modules_of_old_and_new_versions(tmp_path: Path, kind: str) -> None:
    write_modules(tmp_path, 16, kind=kind)
    found = read_sentence_modules(tmp_path, CONFIG)
    assert found is not None
    assert (found.pooling, found.steps, found.width) == (("mean",), (Normalize(),), 16)


def test_no_flag_at_all_is_the_mean(tmp_path: Path) -> None:
    write_modules(tmp_path, 16, pooling={"pooling_mode_cls_token": False})
    found = read_sentence_modules(tmp_path, CONFIG)
    assert found is not None
    assert found.pooling == ("mean",)


def test_a_dense_layer_changes_the_width(tmp_path: Path) -> None:
    write_modules(tmp_path, 16, steps=({"out_features": 5}, "Normalize"))
    found = read_sentence_modules(tmp_path, CONFIG)
    assert found is not None
    assert found.width == 5
    assert found.steps[0] == Dense("2_Dense", (16, 5), True, "Identity", False)


@pytest.mark.parametrize("kind", ["WordWeights", "CNN", "Router"])
def test_other_modules_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    write_modules(tmp_path, 16, steps=(kind,))
    assert kind in refusal(tmp_path)


def test_code_of_its_own_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, 16, kind="custom_st")
    assert "'custom_st.Transformer' is code of its own" in refusal(tmp_path)


def test_a_model_that_pools_otherwise_first_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, 16)
    listed = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    (tmp_path / "modules.json").write_text(json.dumps(listed[:1] + listed[2:]), encoding="utf-8")
    assert "its modules are Transformer, Normalize" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is false"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "'attention' is not known"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 8}, "it pools 8 elements"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Mish"}, "Mish"),
        ("2_Dense/config.json", {"activation_function": "my.code.Tanh"}, "my.code.Tanh"),
        ("2_Dense/config.json", {"in_features": 4}, "in_features is 4"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "token_embeddings"),
        ("2_Dense/config.json", {"out_features": 4}, "must have the shape [4, 16]"),
    ],
)
def test_options_are_refused_by_name(tmp_path: Path, file: str, values: dict[str, Any], words: str) -> None:
    write_modules(tmp_path, 16, steps=({},))
    change(tmp_path / file, **values)
    assert words in refusal(tmp_path)


def test_a_pooling_without_its_config_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, 16)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    assert "1_Pooling/config.json: no such file" in refusal(tmp_path)


def test_a_module_without_a_folder_is_told_by_its_file(tmp_path: Path) -> None:
    write_modules(tmp_path, 16, steps=({},))
    listed = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    del listed[2]["path"]
    (tmp_path / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    assert "modules.json: in_features is None" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "prompts must be texts"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length is 'x'"),
    ],
)
def test_settings_are_read_before_any_work(
    tmp_path: Path, file: str, values: dict[str, Any], words: str
) -> None:
    write_modules(tmp_path, 16)
    (tmp_path / file).write_text(json.dumps(values), encoding="utf-8")
    assert words in refusal(tmp_path)


def test_another_task_of_the_transformer_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, 16)
    (tmp_path / "sentence_bert_config.json").write_text('{"transformer_task": "fill-mask"}', encoding="utf-8")
    assert "transformer_task is 'fill-mask'" in refusal(tmp_path)


def test_pickled_weights_of_a_dense_layer_are_not_read(tmp_path: Path) -> None:
    write_modules(tmp_path, 16, steps=({},))
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "pytorch_model.bin")
    assert "not stored as model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{}", '["a"]', "nothing"])
def test_no_list_of_modules_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        read_sentence_modules(tmp_path, CONFIG)


def test_a_module_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, 16)
    text = (tmp_path / "modules.json").read_text(encoding="utf-8").replace("1_Pooling", "../1_Pooling")
    (tmp_path / "modules.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="outside the folder"):
        module_folders(tmp_path / "modules.json")


def test_files_are_copied_with_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    source = write_modules(tmp_path / "model", 16, steps=({}, "Normalize"))
    (source / "config_sentence_transformers.json").write_text('{"prompts": {}}', encoding="utf-8")
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 8}', encoding="utf-8")
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "out").mkdir()
    copy_sentence_files(source, tmp_path / "out")
    found = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*.*")
        if path.is_file()
    }
    assert found == {
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }


def test_a_pooling_without_a_mode_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, 16, pooling={"pooling_mode": []})
    with pytest.raises(UnsupportedModelError, match="no mode of pooling"):
        read_sentence_modules(tmp_path, CONFIG)
