"""The text of a target task as sequences of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.perplexity import tokens_of


def target_tokens(path: str | Path, tokenizer_folder: Path, length: int, count: int) -> Tensor:
    """Return the first sequences of a text: consecutive pieces, without special tokens.

    Args:
        path: A UTF-8 text file of the task.
        tokenizer_folder: Holds the model's tokenizer.json.
        length: Tokens of a sequence, at least 2.
        count: Sequences wanted; a text that has fewer gives those it has.

    Returns:
        int64 (sequences, length), at most `count` of them.

    Raises:
        InputError: The file is missing, empty, no UTF-8 text or too short for one sequence.
    """
    if length < 2 or count < 1:
        raise InputError(
            f"{count} sequences of {length} tokens train nothing",
            where="target",
            fix="give at least one sequence of at least 2 tokens",
        )
    tokens = tokens_of(Path(path).expanduser(), tokenizer_folder)
    whole = len(tokens) // length
    if whole == 0:
        raise InputError(
            f"the text has {len(tokens)} tokens, one sequence takes {length}",
            where=str(path),
            fix="give a longer text of the task",
        )
    sequences = min(whole, count)
    return torch.from_numpy(tokens[: sequences * length].copy()).reshape(sequences, length)
