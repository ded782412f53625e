"""Bundle files: atomic output folder, manifest, side files, GenAI config, model card."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import VOCABULARY, trained_tokenizer
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import rk_export
from rk_export import manifest as manifest_file
from rk_export.bundle.genai import genai_config, write_genai_config
from rk_export.bundle.model_card import ModelCard, model_card
from rk_export.errors import InputError
from rk_export.folders import AtomicFolder, check_free_space
from rk_export.manifest import check_manifest, write_manifest
from rk_export.options.run import Run
from rk_export.source.side_files import write_side_files


def config(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 260,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(**{"model_type": "llama", **sizes, **changes})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder with a byte-level tokenizer and generation defaults, but no weights."""
    folder = tmp_path / "source"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(["<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 5], do_sample=True, temperature=0.6, top_k=20).save_pretrained(folder)
    return folder


# --- output folder


def test_the_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with AtomicFolder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
        assert partial.parent == target.parent
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "1"
    assert target.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777


def write_and_fail(target: Path, error: Exception, **options: Any) -> None:
    with AtomicFolder(target, **options) as partial:
        (partial / "config.json").write_text("new")
        raise error


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        write_and_fail(tmp_path / "out", RuntimeError("boom"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    with AtomicFolder(old):
        pass  # an empty folder counts as absent
    (old / "config.json").write_text("old")
    with pytest.raises(InputError, match="--force"), AtomicFolder(old):
        pytest.fail("the body must not run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a folder"), AtomicFolder(tmp_path / "file", force=True):
        pytest.fail("the body must not run")
    assert (old / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "text", "ours"),
    [
        ("rk_manifest.json", "{}", True),
        ("config.json", '{"rk_export": {"version": 1}}', True),
        ("config.json", '{"model_type": "llama"}', False),
        ("config.json", "[", False),
        ("holiday.jpg", "", False),
    ],
)
def test_force_replaces_only_folders_of_ours(tmp_path: Path, name: str, text: str, ours: bool) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / name).write_text(text)
    if ours:
        with AtomicFolder(old, force=True) as partial:
            (partial / "new").write_text("1")
    else:
        with pytest.raises(InputError, match="not replaced"), AtomicFolder(old, force=True):
            pytest.fail("the body must not run")
    assert [p.name for p in old.iterdir()] == (["new"] if ours else [name])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_old_output_survives_a_failure(tmp_path: Path) -> None:
    old = old_output(tmp_path)
    with pytest.raises(OSError, match="broken"):
        write_and_fail(old, OSError(errno.EIO, "broken"), force=True)
    assert (old / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_old_output_comes_back_when_the_swap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_output(tmp_path)
    rename = Path.rename

    def rename_or_fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(OSError, match="broken"), AtomicFolder(old, force=True) as partial:
        (partial / "config.json").write_text("new")
    assert (old / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def old_output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "rk_manifest.json").write_text("{}")
    (folder / "config.json").write_text("old")
    return folder


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"no space left.*1,234 bytes"),
        AtomicFolder(tmp_path / "o", needed=1234),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(InputError, match=r"no space left.*are free"),
        AtomicFolder(tmp_path / "o", needed=1 << 60),
    ):
        pytest.fail("the body must not run")
    with pytest.raises(InputError, match="no space left"):
        check_free_space(tmp_path / "not" / "yet" / "made", 1 << 60)
    check_free_space(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


# --- manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "triton").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(bytes(3000))
    os.link(folder / "model.onnx.data", folder / "triton" / "weights")
    write_manifest(folder, {"source": "tiny", "parity": {"c": 1e-5}})
    return folder


@pytest.mark.whole
def test_the_manifest_lists_every_file_and_the_versions(bundle: Path) -> None:
    manifest = check_manifest(bundle)
    assert manifest["source"] == "tiny"
    assert sorted(manifest["files"]) == ["model.onnx", "model.onnx.data", "triton/weights"]
    assert manifest["files"]["model.onnx.data"] == manifest["files"]["triton/weights"]
    assert manifest["files"]["model.onnx"]["bytes"] == 5
    assert manifest["versions"]["torch"]
    write_manifest(bundle, {"source": "again"})  # its own file is not listed in it
    assert check_manifest(bundle)["source"] == "again"


@pytest.mark.whole
def test_a_damaged_bundle_is_refused_with_the_file_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bundle / "model.onnx.data"
    data.write_bytes(bytes(2999) + b"\1")
    with pytest.raises(InputError, match=r"model\.onnx\.data: corrupted: its checksum"):
        check_manifest(bundle)
    check_manifest(bundle, hashes=False)
    data.write_bytes(bytes(2000))
    monkeypatch.setattr(manifest_file, "sha256_of", lambda path: pytest.fail("sizes come first"))
    with pytest.raises(InputError, match=r"model\.onnx\.data: corrupted: 2,000 bytes instead of 3,000"):
        check_manifest(bundle)
    data.unlink()
    with pytest.raises(InputError, match=r"model\.onnx\.data: listed in the manifest but missing"):
        check_manifest(bundle)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"format": 1}', "not readable"),
        ('{"format": 99, "files": {}}', "another format"),
        ('{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}', "outside"),
    ],
)
def test_a_broken_manifest_is_refused(bundle: Path, text: str, message: str) -> None:
    (bundle / "rk_manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        check_manifest(bundle)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundle here"):
        check_manifest(tmp_path)


# --- side files and GenAI


def test_side_files_load_in_transformers_and_name_no_new_class(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    original = config(quantization_config={"quant_method": "x"}, auto_map={"AutoConfig": "evil.py"})
    generation = write_side_files(folder, source=source, config=original)

    assert generation.eos_token_id == [1, 5]
    assert GenerationConfig.from_pretrained(folder).temperature == 0.6
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == "llama"
    assert {"quantization_config", "auto_map"}.isdisjoint(written)
    assert original.quantization_config  # the caller's object is left alone
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in tokenizer
    text = "Hello, 2023!"
    assert AutoTokenizer.from_pretrained(folder).encode(text) == AutoTokenizer.from_pretrained(source).encode(
        text
    )
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_a_source_without_tokenizer_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, empty = tmp_path / "out", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    generation = write_side_files(folder, source=empty, config=config())
    assert "no tokenizer" in caplog.text
    assert generation.eos_token_id == 1
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json"]


def test_genai_config_states_names_sizes_and_defaults() -> None:
    generation = GenerationConfig(eos_token_id=[1, 5], do_sample=True, temperature=0.6)
    values = genai_config(config(head_dim=32), ep="cpu", context_length=128, generation=generation)
    model, decoder = values["model"], values["model"]["decoder"]

    assert (model["type"], model["context_length"], model["vocab_size"]) == ("llama", 128, 260)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (0, [1, 5], 1)
    assert (decoder["head_size"], decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (
        32,
        4,
        2,
    )
    assert decoder["num_hidden_layers"] == 3
    assert decoder["session_options"]["provider_options"] == []
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"
    assert values["search"]["past_present_share_buffer"] is True
    assert (values["search"]["do_sample"], values["search"]["temperature"]) == (True, 0.6)
    assert values["search"]["max_length"] == 128


def test_genai_config_of_cuda_unknown_families_and_missing_eos() -> None:
    cuda = genai_config(config(), ep="cuda", context_length=8)
    session_options = cuda["model"]["decoder"]["session_options"]
    assert session_options["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]
    assert "ep.cuda.fpa_intb_gemm" not in session_options
    assert cuda["model"]["decoder"]["head_size"] == 16
    gpt2 = AutoConfig.for_model("gpt2", n_layer=2, n_head=4, n_embd=64)
    values = genai_config(gpt2, ep="cpu", context_length=8)
    assert values["model"]["type"] == "decoder"
    assert values["model"]["decoder"]["num_key_value_heads"] == 4
    with pytest.raises(InputError, match="eos_token_id"):
        genai_config(config(eos_token_id=None), ep="cpu", context_length=8)


@pytest.mark.parametrize("family", ["llama", "olmo2"])  # one that GenAI names, one generic decoder
def test_genai_takes_the_config_and_tokenizes_alike(source: Path, tmp_path: Path, family: str) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    folder = tmp_path / "out"
    folder.mkdir()
    settings = config(model_type=family)
    generation = write_side_files(folder, source=source, config=settings)
    write_genai_config(folder, genai_config(settings, ep="cpu", context_length=64, generation=generation))

    text = "Hello, 2023! Überraschung\n\tend"
    tokens = og.Tokenizer(str(folder)).encode(text).tolist()
    assert tokens == Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids


# --- model card


def test_the_model_card_has_front_matter_results_and_every_runtime() -> None:
    card = ModelCard("tiny-int4", "org/tiny: a", "cuda", 128, "Made small.", (("bytes", "12"),), "apache-2.0")
    text = model_card(card)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "org/tiny: a"
    assert front["license"] == "apache-2.0"
    assert "| bytes | 12 |" in text
    for runtime in ("rk-export run", "onnxruntime_genai", "ORTModelForCausalLM", "InferenceSession"):
        assert runtime in text
    assert 'providers=["CUDAExecutionProvider"]' in text
    assert "Measured" not in model_card(ModelCard("t", "b", "cpu", 8, "s"))
    assert "past_conv" not in text


@pytest.mark.whole
def test_the_card_of_a_model_with_states_names_them_and_no_runtime_that_drops_them(tmp_path: Path) -> None:
    tiny_model("lfm2", vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    trained_tokenizer().save_pretrained(tmp_path / "model")
    rk_export.export(tmp_path / "model", tmp_path / "out", run=Run(threads=1))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "past_conv.N" in text
    assert "ORTModel" not in text
