"""Text files as tokens, and the function from tokens to logits that every model is measured through."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.text import TextCodec
from rk_export.runtime.token_gate import TokenGate

# From token ids (batch, length) to logits (batch, length, vocabulary).
LogitsFn = Callable[[np.ndarray], Any]


def tokens_of(path: str | os.PathLike[str], tokenizer_folder: str | os.PathLike[str]) -> np.ndarray:
    """Tokenize a UTF-8 text file without special tokens.

    Returns:
        int64 (tokens,).

    Raises:
        InputError: The file is missing, empty or no text, or the folder holds no usable ``tokenizer.json``.
    """
    text = _read(Path(path))
    vocabulary = Path(tokenizer_folder) / "tokenizer.json"
    if not vocabulary.is_file():
        raise InputError(
            "tokenizer.json is missing", where=str(tokenizer_folder), fix="add the model's fast tokenizer"
        )
    return np.array(TextCodec(vocabulary).encode(text, special_tokens=False), dtype=np.int64)


def known_tokens(
    path: str | os.PathLike[str],
    tokenizer_folder: str | os.PathLike[str],
    rows: int,
    *,
    limit: int | None = None,
) -> np.ndarray:
    """Tokenize as `tokens_of` does, and refuse tokens that a model does not know.

    Args:
        path: A UTF-8 text file.
        tokenizer_folder: Holds ``tokenizer.json``.
        rows: Rows of the model's embedding.
        limit: Use the first ``limit`` tokens only.

    Raises:
        InputError: As `tokens_of`, or a token has no row.
    """
    tokens = tokens_of(path, tokenizer_folder)[:limit]
    codec = TextCodec(Path(tokenizer_folder) / TOKENIZER_FILE)
    TokenGate(rows, text_of=codec.token_text).check(tokens, where=str(path))
    return tokens


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError("no such file", where=str(path), fix="give a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "not a UTF-8 text file", where=str(path), fix="give plain text, encoded as UTF-8"
        ) from error
    if "\0" in text:
        raise InputError(
            "holds binary data, not text", where=str(path), fix="give plain text, encoded as UTF-8"
        )
    if not text.strip():
        raise InputError("the text is empty", where=str(path), fix="give a text of at least a few sentences")
    return text
