"""Tokens to text and back: prompt encoding, incremental decoding, stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rk_export.errors import InputError
from rk_export.json_codec import load_json

_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are not yet a whole character


def open_tokenizer(path: Path) -> Any:
    """Return the ``tokenizers.Tokenizer`` of a file.

    Raises:
        InputError: The file is no tokenizer, or beyond the bounds of every JSON file that is read.
    """
    fix = "download or export it again"
    try:
        load_json(path, fix=fix)
    except InputError as error:
        raise InputError(f"not a tokenizer: {error.what}", where=str(path), fix=fix) from error
    try:
        with panics_are_errors():
            return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"not a tokenizer ({error})", where=str(path), fix=fix) from error


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Raise RuntimeError where a library in Rust gives up on its input: it raises what is no ``Exception``."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # a class that cannot be imported
            raise RuntimeError(str(error)) from error
        raise


class TextCodec:
    """The tokenizer of a bundle.

    Args:
        path: ``tokenizer.json``.

    Raises:
        InputError: The file is missing or is no tokenizer; later, that it cannot do what it is asked.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(
                "no such file", where=str(path), fix="put tokenizer.json in the bundle, or give token ids"
            )
        self._path, self._tokenizer = path, open_tokenizer(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self._hidden = {index: str(token.content) for index, token in added.items() if token.special}

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with the special tokens that the post-processor adds.

        Raises:
            InputError: The text holds halves of surrogate pairs, which no UTF-8 has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"not UTF-8 ({error})", where="prompt", fix="encode it as UTF-8") from error
        with self._said():
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def token_text(self, token: int) -> str | None:
        """Return how the vocabulary writes a token, or None where it has no such token."""
        text = self._tokenizer.id_to_token(token)
        return None if text is None else str(text)

    def token_ids(self) -> dict[str, int]:
        """Return every token that a text can be turned into, added tokens included, with its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special tokens left out."""
        with self._said():
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Say which file brought what the library cannot do."""
        try:
            with panics_are_errors():
                yield
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"the tokenizer cannot be used ({error})",
                where=str(self._path),
                fix="download or export it again",
            ) from error

    def hidden_text(self, token: int) -> str:
        """Return the text of a special token, which `decode` leaves out; empty for every other token."""
        return self._hidden.get(token, "")


class TextStream:
    """Decodes one token at a time; a piece is given out when its last character is whole.

    The joined pieces are the decoded sequence: each piece is the difference between two decodings that start
    at the same token, so characters of several tokens and spaces that depend on a neighbour come out right.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._tokens: list[int] = []
        self._start = 0  # decodings start here
        self._shown = 0  # tokens before this one are already given out

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain, often empty."""
        self._tokens.append(token)
        piece = self._pending()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return piece

    def flush(self) -> str:
        """Return what is left, incomplete characters included."""
        piece = self._pending()
        self._start = self._shown = len(self._tokens)
        return piece

    def _pending(self) -> str:
        shown = self._codec.decode(self._tokens[self._start : self._shown])
        return self._codec.decode(self._tokens[self._start :])[len(shown) :]


class StopMatcher:
    """Holds text back as long as it may be the beginning of a stop string.

    A stop string is looked for in the text with its special tokens, and in the text that is shown, without them.

    Args:
        stops: The stop strings, none empty.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held: list[tuple[str, bool]] = []  # characters, and whether they are shown
        self.stopped = False

    def push(self, piece: str, *, shown: bool = True) -> str:
        """Add text and return what can be shown; sets ``stopped`` once a stop string is complete.

        Args:
            piece: The text.
            shown: False for a special token: it is matched and never returned.

        Returns:
            What can be shown now; nothing once a stop string was complete.
        """
        if self.stopped:
            return ""
        held = [*self._held, *((character, shown) for character in piece)]
        places = [index for index, (_, visible) in enumerate(held) if visible]  # of the shown characters
        texts = (("".join(one for one, _ in held), range(len(held))), (_shown(held), places))
        cuts = [where[text.find(stop)] for text, where in texts for stop in self._stops if stop in text]
        self.stopped = bool(cuts)
        if not cuts:
            overlaps = (
                (where, len(text) - _overlap(text, stop)) for text, where in texts for stop in self._stops
            )
            cuts = [len(held), *(where[start] for where, start in overlaps if start < len(where))]
        cut = min(cuts)
        self._held = [] if self.stopped else held[cut:]
        return _shown(held[:cut])

    def flush(self) -> str:
        """Return the text held back; nothing more will come."""
        held, self._held = self._held, []
        return _shown(held)


def _shown(characters: list[tuple[str, bool]]) -> str:
    return "".join(character for character, visible in characters if visible)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
