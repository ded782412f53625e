"""Tokens drawn from an encoder's vocabulary, as calibration text of a model that comes without any.

An encoder writes no text, and embedding models are stored without the head that fills masks. So every ordinary token is
as likely as every other, between the special tokens that the tokenizer puts around a text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rk_export.model.context import own_context
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.special_tokens import listed_tokens
from rk_export.runtime.text import TextCodec
from rk_export.source.protocol import Source

LENGTH = 128  # tokens of a sequence, unless the model's context is shorter
REASON = "no text was given: tokens drawn uniformly from the model's vocabulary stand for it"
_WORD = "a"  # stands between the special tokens


def uniform_text(source: Source, tokens: int, seed: int) -> Tensor:
    """Return sequences of random tokens.

    Args:
        source: The dense model.
        tokens: How many at least; sequences are whole.
        seed: Equal seeds give equal tokens.

    Returns:
        int64 (sequences, length): `LENGTH` tokens each, fewer if the model's context is shorter.
    """
    length = min(LENGTH, own_context(source.config))
    sequences = -(-tokens // length)
    before, after, special = _around(source)
    rows = source.description.table_shape[0]
    ordinary = torch.tensor([token for token in range(rows) if token not in special])
    drawn = torch.randint(len(ordinary), (sequences, length), generator=torch.Generator().manual_seed(seed))
    text = ordinary[drawn]
    if len(before) + len(after) < length:
        text[:, : len(before)] = torch.tensor(before, dtype=torch.int64)
        text[:, length - len(after) :] = torch.tensor(after, dtype=torch.int64)
    return text


def _around(source: Source) -> tuple[list[int], list[int], set[int]]:
    """Return the tokens that stand before and behind a text, and all that belong to none."""
    named = (getattr(source.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep"))
    special = {token for token in named if isinstance(token, int)}
    path = source.folder / TOKENIZER_FILE
    if not path.is_file():
        return [], [], special
    special |= {int(token["id"]) for token in listed_tokens(source.folder) if token.get("special")}
    ids = TextCodec(path).encode(_WORD)
    words = [place for place, token in enumerate(ids) if token not in special]
    if not words:
        return [], [], special
    return ids[: words[0]], ids[words[-1] + 1 :], special
