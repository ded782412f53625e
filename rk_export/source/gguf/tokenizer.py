"""Tokenizer of a GGUF file, with the splitting rule that llama.cpp knows only by name.

``transformers`` rebuilds vocabulary, merges and special tokens but falls back to GPT-2's rule for names that
it does not know; text with digits then gets other tokens than from the original. Here those are refused.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.json_codec import load_json
from rk_export.runtime.text import panics_are_errors
from rk_export.source.gguf.file import GgufFile

logger = logging.getLogger(__name__)

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo"})
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"})
_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"})
_QWEN2 = frozenset({"qwen2", "deepseek-r1-qwen", "stablelm2"})
_TEKKEN, _GPT4O = "tekken", "gpt-4o"
_DEEPSEEK_CODER, _SEED_CODER = "deepseek-coder", "seed-coder"
_DEFAULT = (None, "default")
_NFC = frozenset({"qwen2", "deepseek-r1-qwen"})
WHOLE_WORDS_FIRST = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
_OWN_SPACES = frozenset({"gemma2", "gemma3", "phi3"})  # transformers knows what these do with spaces
_KNOWN = (
    _GPT2 | _SINGLE_DIGITS | _LLAMA3 | _QWEN2 | {_TEKKEN, _GPT4O, _DEEPSEEK_CODER, _SEED_CODER, "default"}
)

_CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
_DEEPSEEK_CODER_RULES = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_SPACES = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")


def check_tokenizer(source: GgufFile) -> None:
    """Check that the tokenizer is of a kind that can be rebuilt.

    Raises:
        InputError: It is incomplete.
        UnsupportedModelError: The vocabulary is of another kind, or its splitting rule is not known.
    """
    kind, rule = source.get("tokenizer.ggml.model"), source.get("tokenizer.ggml.pre")
    if kind not in (_BYTE_LEVEL, _SENTENCEPIECE):
        raise UnsupportedModelError(
            f"tokenizer {kind!r} cannot be rebuilt" if kind else "the GGUF file holds no tokenizer",
            where=f"{source.path}, key tokenizer.ggml.model",
            fix=f"use the Hugging Face checkpoint; known: {_BYTE_LEVEL}, {_SENTENCEPIECE}",
        )
    if kind == _BYTE_LEVEL and rule is not None and str(rule) not in _KNOWN:
        raise UnsupportedModelError(
            f"the tokenizer's splitting rule {rule!r} is not known, so its tokens could be wrong",
            where=f"{source.path}, key tokenizer.ggml.pre",
            fix=f"use the Hugging Face checkpoint; known: {', '.join(sorted(_KNOWN))}",
        )
    _check_lists(source)


def _check_lists(source: GgufFile) -> None:
    """The vocabulary has what orders its merges, and its special tokens lie in it."""
    ordered = source.get("tokenizer.ggml.model") == _BYTE_LEVEL or "tokenizer.ggml.merges" in source.metadata
    for name in ("tokens", "merges" if ordered else "scores"):
        if not isinstance(source.get(f"tokenizer.ggml.{name}"), list):
            raise InputError(
                f"the tokenizer has no {name}",
                where=f"{source.path}, key tokenizer.ggml.{name}",
                fix="the file is incomplete: take another conversion of this model",
            )
    tokens = len(source.get("tokenizer.ggml.tokens"))
    for name in ("bos", "eos", "eot", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        token = source.get(key)
        if token is not None and not (isinstance(token, int) and 0 <= token < tokens):
            raise InputError(f"{token!r} is none of {tokens} tokens", where=f"{source.path}, key {key}")


def write_tokenizer(source: GgufFile, folder: Path, *, max_length: int) -> None:
    """Save the tokenizer of a GGUF model that ``check_tokenizer`` has accepted.

    Args:
        source: The opened model.
        folder: Where ``tokenizer.json`` and its companions go.
        max_length: Tokens the model can attend to.

    Raises:
        InputError: Vocabulary and merges do not belong together.
    """
    with tempfile.TemporaryDirectory() as alone:  # tokenizer files beside the GGUF must not be picked up
        (Path(alone) / "model.gguf").symlink_to(source.path.resolve())
        try:
            with panics_are_errors():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(
                    alone, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(
                f"its tokenizer cannot be rebuilt: {error}",
                where=str(source.path),
                fix="the file is damaged: take another conversion of this model",
            ) from error
    if source.get("tokenizer.ggml.model") == _BYTE_LEVEL:
        _split_words(tokenizer, source)
    elif source.get("tokenizer.ggml.add_space_prefix") is False and source.architecture not in _OWN_SPACES:
        _leave_first_space_out(tokenizer.backend_tokenizer)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    _leave_strangers_out(folder / "tokenizer.json", len(source.get("tokenizer.ggml.tokens")))


def _leave_strangers_out(path: Path, tokens: int) -> None:
    """Take out special tokens that transformers adds for its own classes: the embedding has no rows for them."""
    data = load_json(path, fix="take another conversion of this model")
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < tokens]
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2), encoding="utf-8")


def _split_words(tokenizer: Any, source: GgufFile) -> None:
    """Give a byte-level tokenizer the rule that its merges were learned under."""
    rule, backend = source.get("tokenizer.ggml.pre"), tokenizer.backend_tokenizer
    if rule in _DEFAULT:
        logger.warning(
            "%s: the file does not say how its tokenizer splits text; llama.cpp's default rule is used, which may "
            "give other tokens than the original",
            source.path.name,
        )
    backend.pre_tokenizer = splitter(rule)
    if rule in _NFC:
        backend.normalizer = normalizers.NFC()
    if rule in WHOLE_WORDS_FIRST:
        if isinstance(backend.model, models.BPE):
            backend.model.ignore_merges = True  # what is in the vocabulary is one token
        if "tokenizer.ggml.add_bos_token" not in source.metadata:  # these families begin with it all the same
            tokenizer.add_bos_token = tokenizer.bos_token is not None


def _leave_first_space_out(backend: Any) -> None:
    """A SentencePiece vocabulary whose texts do not begin with a space of their own."""
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def splitter(rule: str | None) -> Any:
    """Return the pre-tokenizer that a known splitting rule of llama.cpp names."""
    if rule in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if rule in _DEFAULT:
        return _splits(*_default_rules())
    if rule == _TEKKEN:
        return _splits(_cased_words(r"\p{N}", contraction=""))
    if rule == _GPT4O:
        return _splits(_cased_words(r"\p{N}{1,3}", contraction=f"(?i:{_CONTRACTION})?"))
    if rule == _DEEPSEEK_CODER:
        return _splits(*_DEEPSEEK_CODER_RULES)
    if rule == _SEED_CODER:
        return _splits(_words(r"\p{N}", punctuation=r" ?[^\s\p{L}\p{N}\r\n]+"))
    return _splits(_words(r"\p{N}{1,3}" if rule in _LLAMA3 else r"\p{N}"))


def _splits(*rules: str) -> Any:
    """Split by one expression after the other, then spell the pieces in bytes."""
    steps = [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in rules]
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _words(numbers: str, punctuation: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """Contractions, words with one leading mark, ``numbers``, punctuation, line breaks, other white space."""
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return "|".join([f"(?i:{_CONTRACTION})", word, numbers, punctuation, *_SPACES])


def _cased_words(numbers: str, contraction: str) -> str:
    """Like ``_words``, but words end where lower case turns into upper case, and take their contraction along."""
    mark = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    punctuation = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    word, capitals = f"{mark}{upper}*{lower}+{contraction}", f"{mark}{upper}+{lower}*{contraction}"
    return "|".join([word, capitals, numbers, punctuation, *_SPACES])


def _default_rules() -> tuple[str, ...]:
    """llama.cpp's rule for files that name none: marks apart, GPT-2's words, numbers in groups of three."""
    gpt2 = rf"{_CONTRACTION}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
    return r"[\p{P}$+<=>^~|]+", gpt2, r"\p{N}+", "[0-9][0-9][0-9]"
