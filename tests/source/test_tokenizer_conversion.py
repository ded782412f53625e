"""Tokenizers of model folders: converted before any work, or refused with what lies there."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
from conftest import SENTENCES, Cli
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from rk_export.errors import InputError
from rk_export.model.context import PROMPT_LENGTH
from rk_export.parity.probe import make_probe
from rk_export.source.tokenizer_conversion import check_tokenizer, convert_tokenizer
from rk_export.source.tokenizer_files import copy_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model file of 90 pieces."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=90,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Folder of a tiny Llama model of 90 tokens without tokenizer."""
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=90).save_pretrained(folder)
    return folder


def test_a_sentencepiece_model_is_converted(trained: Path, model: Path, tmp_path: Path) -> None:
    shutil.copy(trained, model)
    check_tokenizer(model, 90)
    convert_tokenizer(model, tmp_path)
    converted = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(trained)).encode(SENTENCES[0])
    assert converted.encode(SENTENCES[0], add_special_tokens=False).ids == expected
    assert not (model / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "content", [b"no protocol buffer at all", b"", b"\x00" * 64], ids=["text", "empty", "zeros"]
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["compress", "dry-run"])
def test_a_broken_vocabulary_is_refused_before_work(
    model: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    dry: tuple[str, ...],
) -> None:
    monkeypatch.setattr("rk_export.commands.stages.compression_inputs", None)
    (model / "tokenizer.model").write_bytes(content)
    ended = cli("compress", model, "-o", tmp_path / "out", *dry)
    assert ended.code == 2
    assert "tokenizer.model: the tokenizer" in ended.err
    assert "Fix: add the fast tokenizer's tokenizer.json" in ended.err
    assert not (tmp_path / "out").exists()


def test_an_absent_package_is_named(trained: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(trained, model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match="needs the package sentencepiece") as caught:
        check_tokenizer(model, 90)
    assert str(caught.value.fix).startswith("pip install sentencepiece")


def test_a_tokenizer_of_too_few_tokens_is_refused(trained: Path, model: Path) -> None:
    shutil.copy(trained, model)
    with pytest.raises(InputError, match="one of 90 tokens, the model embeds 32000"):
        check_tokenizer(model, 32000)


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '{"model": 1}'])
def test_a_broken_fast_tokenizer_is_refused(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        check_tokenizer(model, 90)


def test_settings_alone_are_no_tokenizer(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    check_tokenizer(model, 90)  # none at all: the bundle takes token ids
    (model / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"no vocabulary: the tokenizer is tokenizer_config\.json alone"):
        check_tokenizer(model, 90)


def written(tokenizer: Tokenizer, folder: Path, config: dict[str, str]) -> Path:
    """Save a tokenizer without its special tokens in a list of their own, as `Tokenizer.save` leaves it."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_special_token_that_only_the_config_names_is_kept_whole(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "[UNK]"}
    source = written(plain, tmp_path / "source", config)
    (tmp_path / "bundle").mkdir()
    copy_tokenizer(source, tmp_path / "bundle")
    got = Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert (
        got.encode("a</s>a").ids == AutoTokenizer.from_pretrained(source)("a</s>a")["input_ids"] == [0, 2, 0]
    )


@pytest.mark.whole
def test_a_class_that_makes_other_tokens_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "</s>": 3}, [], unk_token="<unk>"))
    plain.normalizer = normalizers.Lowercase()
    plain.add_special_tokens(["<unk>", "</s>"])
    config = {"eos_token": "</s>", "unk_token": "<unk>"}
    for name, warned in (("PreTrainedTokenizerFast", False), ("LlamaTokenizerFast", True)):
        source = written(plain, tmp_path / name, config | {"tokenizer_class": name})
        (tmp_path / f"{name}-bundle").mkdir()
        caplog.clear()
        copy_tokenizer(source, tmp_path / f"{name}-bundle")
        assert ("transformers makes other tokens of" in caplog.text) is warned, caplog.text


def test_the_probe_is_not_cut_by_what_the_tokenizer_stores(tmp_path: Path) -> None:
    alphabet = {chr(code): index for index, code in enumerate(range(32, 127))}
    plain = Tokenizer(models.BPE(alphabet, [], unk_token=" "))
    plain.enable_truncation(4)
    plain.enable_padding(length=200)
    folder = written(plain, tmp_path / "source", {})
    assert make_probe(folder, len(alphabet)).batch.shape[1] == PROMPT_LENGTH


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0", "model": {"type": "Nope"}}'])
def test_evaluation_refuses_a_broken_tokenizer(cli: Cli, model: Path, prose: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    ended = cli("eval", model, "--text", prose)
    assert (ended.code, "tokenizer.json: not a tokenizer" in ended.err) == (2, True), ended.err
