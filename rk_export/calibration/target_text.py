"""The text of a target task as sequences of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.text import known_tokens, tokens_of


def target_tokens(
    path: str | Path, tokenizer_folder: Path, length: int, count: int, *, rows: int | None = None
) -> Tensor:
    """Return the first sequences of a text: consecutive pieces, without special tokens.

    Args:
        path: A UTF-8 text file of the task.
        tokenizer_folder: Holds the model's tokenizer.json.
        length: Tokens of a sequence, at least 2.
        count: Sequences wanted; a text that has fewer gives those it has.
        rows: Rows of the model's embedding; None looks at no id.

    Returns:
        int64 (sequences, length), at most `count` of them.

    Raises:
        InputError: The file is missing, empty, no UTF-8 text or too short for one sequence, or a token has no row.
    """
    if length < 2 or count < 1:
        raise InputError(
            f"{count} sequences of {length} tokens train nothing",
            where="target",
            fix="give at least one sequence of at least 2 tokens",
        )
    path = Path(path).expanduser()
    tokens = tokens_of(path, tokenizer_folder) if rows is None else known_tokens(path, tokenizer_folder, rows)
    whole = len(tokens) // length
    if whole == 0:
        raise InputError(
            f"the text has {len(tokens)} tokens, one sequence takes {length}",
            where=str(path),
            fix="give a longer text of the task",
        )
    sequences = min(whole, count)
    return torch.from_numpy(tokens[: sequences * length].copy()).reshape(sequences, length)
