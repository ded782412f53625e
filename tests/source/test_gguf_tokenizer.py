"""Tokenizers of GGUF files: each splitting rule cuts text as its public definition says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import regex
from gguf_files import VOCABULARY, model_for_gguf, write_gguf
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer
from transformers.integrations.gguf import gguf_tokenizer_mapping as published

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.source.gguf.convert import gguf_to_folder
from rk_export.source.gguf.tokenizer import splitter

TEXTS = [
    "Hello world's HELLO'S don't DON'T we'll We'LL I'm",
    "1 22 333 4444 1234567 12.5e-3 ١٢٣ ½ Ⅻ 二〇",
    "camelCase HTMLParser iPhone ÀÉ straße ΑΒΓδε ǅungla ʰx नमस्ते e\u0301te\u0301",
    "a\n\nb\r\n\r\n  c\t\td   \n e    ",
    "path/to//file.py\n//\n# --- [x] $5 +<=>^~|` “quoted” 。、！",
    "🙂🙃 👩‍👩‍👧 ﷽ \u00a0nbsp\u3000wide",
    "  leading and trailing  ",
    "'s",
]


def pieces(rule: str | None, text: str) -> list[str]:
    """What the rule cuts text into, decoded from the byte alphabet."""
    table = byte_alphabet()
    cut = splitter(rule).pre_tokenize_str(text)
    return [bytes(table[character] for character in piece).decode() for piece, _ in cut]


def byte_alphabet() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert set(table) == set(ByteLevel.alphabet())
    return table


def cut(pattern: str, texts: list[str]) -> list[str]:
    """Cut each text into matches and what lies between them."""
    found = []
    for text in texts:
        end = 0
        for match in regex.finditer(pattern, text, flags=regex.V1):
            found += [text[end : match.start()], match.group()]
            end = match.end()
        found.append(text[end:])
    return [piece for piece in found if piece]


@pytest.mark.parametrize("rule", ["tekken", "gpt-4o", "llama-bpe", "dbrx", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_rule_cuts_as_its_published_expression(rule: str, text: str) -> None:
    assert pieces(rule, text) == cut(published.GGUF_PRE_TOKENIZER_SPLITS[rule], [text])


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(("rule", "first"), [("gpt-2", None), ("smollm", r"\p{N}"), ("refact", r"\p{N}")])
@pytest.mark.parametrize("text", TEXTS)
def test_gpt2s_words_with_and_without_single_digits(rule: str, first: str | None, text: str) -> None:
    assert pieces(rule, text) == cut(GPT2, cut(first, [text]) if first else [text])


@pytest.mark.parametrize("rule", ["default", None])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world's", ["Hello", " world", "'", "s"]),
        ("1234567 88", ["123", "456", "7", " ", "88"]),
        ("x=$5, (y)", ["x", "=$", "5", ",", " ", "(", "y", ")"]),
        ("a  b\n\nc", ["a", " ", " b", "\n", "\n", "c"]),
        ("\u0661\u0662\u0663\u0664", ["\u0661\u0662\u0663\u0664"]),  # only ASCII digits go in threes
        ("`x` 🙂!", ["`", "x", "`", " 🙂", "!"]),
    ],
)
def test_the_default_rule_is_llama_cpps(rule: str | None, text: str, expected: list[str]) -> None:
    assert pieces(rule, text) == expected


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("deepseek-coder", "x = f(12)\n\n", ["x", " =", " f", "(", "1", "2", ")", "\n", "\n"]),
        ("deepseek-coder", "a  don't. 中文b", ["a", " ", " don", "'", "t", ".", " ", "中文", "b"]),
        ("seed-coder", "x = f(12)\n\n", ["x", " =", " f", "(", "1", "2", ")", "\n\n"]),
        ("seed-coder", "don't;\n  y", ["don", "'t", ";", "\n", " ", " y"]),
        ("llama-bpe", "don't;\n  y", ["don", "'t", ";\n", " ", " y"]),
    ],
)
def test_rules_of_models_for_code(rule: str, text: str, expected: list[str]) -> None:
    assert pieces(rule, text) == expected


@pytest.mark.parametrize(
    ("rule", "tokens"),
    [
        ("smollm", ["hello", "Ġ", "2", "0", "1", "2"]),
        ("gpt-2", ["hello", "Ġ", "20", "12"]),
        ("llama-bpe", ["hello", "Ġ", "20", "1", "2"]),
        ("qwen2", ["hello", "Ġ", "2", "0", "1", "2"]),
        ("tekken", ["hello", "Ġ", "2", "0", "1", "2"]),
        ("gpt-4o", ["hello", "Ġ", "20", "1", "2"]),
        ("default", ["hello", "Ġ", "20", "1", "2"]),
    ],
)
def test_digits_are_split_as_the_rule_says(tmp_path: Path, rule: str, tokens: list[str]) -> None:
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), rule=rule), tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    encoded = tokenizer.encode("hello 2012", add_special_tokens=False)
    assert encoded.tokens == tokens
    assert tokenizer.decode(encoded.ids) == "hello 2012"
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 128


@pytest.mark.parametrize(
    ("rule", "whole"), [("llama-bpe", True), ("tekken", True), ("dbrx", False), ("qwen2", False)]
)
def test_a_word_of_the_vocabulary_that_no_merge_gives(tmp_path: Path, rule: str, whole: bool) -> None:
    model = model_for_gguf("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, rule=rule, words=["Ġworld"])
    tokenizer = AutoTokenizer.from_pretrained(gguf_to_folder(path, tmp_path))
    found = tokenizer.convert_ids_to_tokens(tokenizer("hello world", add_special_tokens=False).input_ids)
    assert found == ["hello", *(["Ġworld"] if whole else ["Ġ", *"world"])]


@pytest.mark.parametrize(
    ("rule", "stated", "begins"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("tekken", None, True), ("qwen2", None, False)],
)
def test_the_first_token_is_added_where_the_family_has_it(
    tmp_path: Path, rule: str, stated: bool | None, begins: bool
) -> None:
    def extend(writer: Any) -> None:
        if stated is not None:
            writer.add_add_bos_token(stated)

    path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), rule=rule, extend=extend)
    folder = gguf_to_folder(path, tmp_path)
    hello = VOCABULARY.index("hello")
    assert AutoTokenizer.from_pretrained(folder)("hello").input_ids == [0] * begins + [hello]


def test_a_file_without_a_rule_is_read_and_said_to_be_uncertain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), rule=None), tmp_path)
    assert "does not say how its tokenizer splits text" in caplog.text


@pytest.mark.parametrize(("space", "tokens"), [(True, ["▁he", "llo"]), (False, ["he", "llo"])])
def test_a_sentencepiece_vocabulary_begins_with_a_space_unless_told(
    tmp_path: Path, space: bool, tokens: list[str]
) -> None:
    scores = {
        "<unk>": 0.0,
        "<s>": 0.0,
        "</s>": 0.0,
        "▁": -9.0,
        "▁he": -1.0,
        "llo": -2.0,
        "he": -3.0,
        "lo": -4.0,
    }
    scores |= dict.fromkeys("helo", -10.0)

    def replace(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(list(scores))
        writer.add_token_scores(list(scores.values()))
        writer.add_token_types([2, 3, 3, *[1] * (len(scores) - 3)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(space)
        writer.add_add_bos_token(False)

    model = model_for_gguf("llama", vocab_size=len(scores))
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model, tokenizer=replace), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hello").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == "hello"


def test_an_unknown_splitting_rule_is_refused_before_any_file_is_written(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), rule="martian")
    with pytest.raises(UnsupportedModelError, match=r"splitting rule 'martian'(?s:.)*gpt-4o(?s:.)*tekken"):
        gguf_to_folder(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "message"), [("rwkv", "tokenizer 'rwkv' cannot be rebuilt"), (None, "holds no tokenizer")]
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, kind: str | None, message: str) -> None:
    def replace(writer: Any) -> None:
        if kind is not None:
            writer.add_tokenizer_model(kind)

    path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), tokenizer=replace)
    with pytest.raises(UnsupportedModelError, match=message):
        gguf_to_folder(path, tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [("tokenizer.ggml.tokens", "has no tokens"), ("tokenizer.ggml.merges", "has no merges")],
)
def test_an_incomplete_tokenizer_is_refused(tmp_path: Path, key: str, message: str) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", model_for_gguf("llama"), extend=lambda writer: writer.kv_data[0].pop(key)
    )
    with pytest.raises(InputError, match=message):
        gguf_to_folder(path, tmp_path)


def test_merges_of_another_vocabulary_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    def exchange(writer: Any) -> None:
        del writer.kv_data[0]["tokenizer.ggml.merges"]
        writer.add_token_merges(["hell fire"])

    path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), extend=exchange)
    with pytest.raises(InputError, match=r"tokenizer cannot be rebuilt(?s:.)*another conversion"):
        gguf_to_folder(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "granite"])
def test_only_tokens_of_the_file_are_special(tmp_path: Path, family: str) -> None:
    """Transformers' converters add special tokens of their own classes, which the embedding has no rows for."""
    folder = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model_for_gguf(family)), tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(VOCABULARY)
    assert set(tokenizer.get_added_vocab()) <= set(VOCABULARY)
    ids = tokenizer("hello<|endoftext|>")["input_ids"]
    assert max(ids) < len(VOCABULARY)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<|endoftext|>"
