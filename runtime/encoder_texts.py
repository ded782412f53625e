"""Texts and pairs of texts as the tokens of an encoder: cut to its length, in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import TOKENIZER_FILE, Section
from rk_export.runtime.text import open_tokenizer, panics_are_errors

Pair = tuple[str, str]


@dataclass(frozen=True)
class Tokens:
    """One text, or a pair, as tokens.

    Args:
        ids: Token ids, special tokens included.
        types: 0 for tokens of a pair's first text, 1 for those of its second.
        spans: Characters that each token covers in its text, from and to; both 0 for special tokens.
    """

    ids: Sequence[int]
    types: Sequence[int]
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """Rows that run through the graph together.

    Args:
        places: Where each row stands among all texts.
        ids: int64 [rows, longest], padded on the right.
        mask: The same, 0 at padding.
        types: The same, the tokens' types.
    """

    places: Sequence[int]
    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray


class EncoderTexts:
    """The tokenizer of an encoder bundle.

    Args:
        folder: The bundle.
        longest: Tokens that a text is cut to, special tokens included; None cuts nothing.
        lower_case: Write texts in small letters first.

    Raises:
        InputError: The bundle has no tokenizer, or a broken one.
    """

    def __init__(self, folder: Path, longest: int | None, lower_case: bool = False) -> None:
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise InputError("no such file", where=str(path), fix="put the model's tokenizer.json there")
        self._tokenizer, self._lower_case = open_tokenizer(path), lower_case
        self._tokenizer.no_padding()
        if longest is None:
            self._tokenizer.no_truncation()
        else:
            side = Section.of_file(folder / "tokenizer_config.json").values.get("truncation_side")
            self._tokenizer.enable_truncation(longest, direction="left" if side == "left" else "right")

    def encode(self, texts: Sequence[str | Pair], prompt: str = "") -> list[Tokens]:
        """Return texts as tokens, each behind a prompt.

        Args:
            texts: As `checked` returns them.
            prompt: In front of each text; pairs have none.

        Raises:
            InputError: A text has no tokens: it is empty, and the tokenizer puts none around it.
        """
        given = [self._prepared(text, prompt) for text in texts]
        with panics_are_errors():
            found = self._tokenizer.encode_batch(given)
        for index, one in enumerate(found):
            if not one.ids:
                raise InputError(f"text {index} has no tokens", where="texts", fix="leave empty texts out")
        return [Tokens(one.ids, one.type_ids, one.offsets) for one in found]

    def _prepared(self, text: str | Pair, prompt: str) -> str | Pair:
        if not isinstance(text, str):
            return (self._small(text[0]), self._small(text[1]))
        return self._small(prompt + text)

    def _small(self, text: str) -> str:
        return text.lower() if self._lower_case else text


def batches(rows: Sequence[Tokens], size: int, tokens: int | None = None) -> Iterator[Batch]:
    """Yield batches of rows, the longest first: rows of similar length need little padding.

    Args:
        rows: One or more.
        size: Most rows of a batch.
        tokens: Most tokens of a batch, padding included, where it has more than one row; None sets no limit.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))
    start = 0
    while start < len(order):
        longest = max(1, len(rows[order[start]].ids))
        most = size if tokens is None else max(1, min(size, tokens // longest))
        places = order[start : start + most]
        start += most
        arrays = np.zeros((3, len(places), len(rows[places[0]].ids)), np.int64)
        for index, row in enumerate(rows[place] for place in places):
            arrays[:, index, : len(row.ids)] = row.ids, np.ones(len(row.ids), np.int64), row.types
        yield Batch(places, *arrays)


def checked(texts: object, *, pairs: bool) -> list[str | Pair]:
    """Return texts as a list.

    Args:
        texts: Whatever was given for them.
        pairs: Whether pairs of texts are taken too.

    Raises:
        InputError: They are no list, or one of them is no text, or a pair where none is taken, or is not UTF-8.
    """
    if isinstance(texts, str):
        raise InputError("one text", where="texts", fix="give a list of texts: [text]")
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping | Set):
        raise InputError(f"a {type(texts).__name__}", where="texts", fix="give a list of texts")
    return [_checked(text, index, pairs) for index, text in enumerate(texts)]


def _checked(text: object, index: int, pairs: bool) -> str | Pair:
    if isinstance(text, str):
        return _encodable(text, index)
    if pairs and isinstance(text, tuple | list) and len(text) == 2:
        first, second = text
        if isinstance(first, str) and isinstance(second, str):
            return _encodable(first, index), _encodable(second, index)
    fix = "give texts, or pairs of two texts" if pairs else "give texts"
    raise InputError(f"text {index} is a {type(text).__name__}", where="texts", fix=fix)


def _encodable(text: str, index: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text {index} is not UTF-8 ({error})", where="texts", fix="encode it as UTF-8"
        ) from error
    return text
