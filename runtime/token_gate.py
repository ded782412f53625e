"""The one gate that every token passes before a graph or a PyTorch model reads it.

Behind it, an id without a row in the embedding is an exception of a library at best, another token at worst: graphs
count negative ids from the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rk_export.errors import InputError


@dataclass(frozen=True)
class TokenGate:
    """What a model can read.

    Args:
        rows: Rows of its embedding; None where nothing tells.
        limit: Most positions, those in a cache included; None where nothing tells.
        text_of: Returns the text of a token, for messages; None where there is no tokenizer.
    """

    rows: int | None
    limit: int | None = None
    text_of: Callable[[int], str | None] | None = None

    def check(self, ids: npt.ArrayLike, *, where: str = "input_ids", past: int = 0) -> None:
        """Refuse ids that are no rows of the embedding, and more of them than the model has positions.

        Args:
            ids: [..., length], integers.
            where: What the ids are, for the message.
            past: Positions in the cache.

        Raises:
            InputError: An id or the length is out of range, or ids are no integers.
        """
        tokens = np.asarray(ids)
        if tokens.size == 0:
            raise InputError("it has no tokens", where=where, fix="give at least one token")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"token ids are {tokens.dtype}", where=where, fix="give integers")
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0:
            raise InputError(f"token id {least} is negative", where=where, fix="give ids from 0 on")
        if self.rows is not None and most >= self.rows:
            raise InputError(
                f"token {self._named(most)} is outside the model's vocabulary of {self.rows} embedding rows",
                where=where,
                fix="use the tokenizer of this model, or a model whose embedding was resized for it",
            )
        length = past + (tokens.shape[-1] if tokens.ndim else 1)
        if self.limit is not None and length > self.limit:
            raise InputError(
                f"{length} positions do not fit into a context of {self.limit}",
                where=where,
                fix=f"give at most {max(0, self.limit - past)} tokens",
            )

    def _named(self, token: int) -> str:
        text = None if self.text_of is None else self.text_of(token)
        return str(token) if text is None else f"{token} ({text!r})"
