"""Tokenizer of a GGUF file, with the splitting rule that llama.cpp knows only by name.

``transformers`` rebuilds vocabulary, merges and special tokens but falls back to GPT-2's rule for names that
it does not know; text with digits then gets other tokens than from the original. Here those are refused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from rk_export.errors import UnsupportedModelError

_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo"})
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"})
_QWEN2 = frozenset({"qwen2", "deepseek-r1-qwen", "stablelm2"})
_NFC = frozenset({"qwen2", "deepseek-r1-qwen"})


def write_tokenizer(
    path: Path, folder: Path, *, model: str | None, rule: str | None, max_length: int
) -> None:
    """Save the tokenizer of the GGUF file ``path`` into ``folder``.

    Args:
        path: The GGUF file.
        folder: Where ``tokenizer.json`` and its companions go.
        model: Value of ``tokenizer.ggml.model``; ``gpt2`` means byte-level BPE.
        rule: Value of ``tokenizer.ggml.pre``, the splitting rule; used by byte-level vocabularies only.
        max_length: Tokens the model can attend to.

    Raises:
        UnsupportedModelError: A byte-level vocabulary with an unknown splitting rule.
    """
    splitter = _splitter(rule, path) if model == "gpt2" else None
    with (
        tempfile.TemporaryDirectory() as alone
    ):  # tokenizer files lying beside the GGUF must not be picked up
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(
            alone, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
        )
    if splitter is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = splitter
    if rule in _NFC:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)


def _splitter(rule: str | None, path: Path) -> Any:
    """Return the pre-tokenizer that a splitting rule names."""
    if rule in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if rule in _LLAMA3 or rule in _QWEN2:
        split = pre_tokenizers.Split(
            _words(r"\p{N}{1,3}" if rule in _LLAMA3 else r"\p{N}"), behavior="isolated"
        )
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    known = ", ".join(sorted(_GPT2 | _SINGLE_DIGITS | _LLAMA3 | _QWEN2))
    raise UnsupportedModelError(
        f"the tokenizer's splitting rule {rule!r} is not known, so its tokens could be wrong",
        where=f"{path}, key tokenizer.ggml.pre",
        fix=f"use the Hugging Face checkpoint; known: {known}",
    )


def _words(numbers: str) -> Regex:
    """Contractions, words with one leading mark, ``numbers``, punctuation, line breaks, other white space."""
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    punctuation = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return Regex("|".join([contraction, word, numbers, punctuation, r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]))
