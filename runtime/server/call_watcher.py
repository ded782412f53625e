"""Holds back the text of a call while an answer comes, and reads the calls when it has ended."""

from __future__ import annotations

from collections.abc import Collection

from rk_export.runtime.engine.records import Answer, Piece
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.tools import Call, CallForm, parse_call, whole_text


class CallWatcher:
    """Of one answer.

    Args:
        decoder: The model.
        form: How it writes calls; None where it makes none.
        names: The functions that it may call.
        forced: The whole answer is a call by its grammar.
        most: Calls that are returned; None returns all.
    """

    def __init__(
        self,
        decoder: Decoder,
        form: CallForm | None,
        names: Collection[str],
        *,
        forced: bool = False,
        most: int | None = None,
    ) -> None:
        self._decoder, self._form, self._names, self._most = decoder, form, names, most
        self._forced = self._holding = forced
        self._held, self._shown = "", False

    def push(self, piece: Piece) -> str:
        """Return the text that is certainly no call."""
        if self._form is None and not self._forced:
            return piece.text
        self._held += piece.text
        if self._holding:
            return ""
        visible = self._held[: self._cut(piece)]
        self._held = self._held[len(visible) :]
        self._shown = self._shown or bool(visible)
        return visible

    def end(self, answer: Answer) -> tuple[str, list[Call]]:
        """Return the text that is still to be shown, and the calls."""
        _, calls = self.read(answer)
        return ("" if calls else self._held), calls

    def read(self, answer: Answer) -> tuple[str, list[Call]]:
        """Return the text of a whole answer without its calls, and the calls."""
        if self._forced:
            calls = parse_call(answer.text)
            return ("" if calls else answer.text), calls[: self._most]
        if self._form is None:
            return answer.text, []
        session = self._decoder.session
        before, calls = self._form.split(answer.text, self._names)
        if not calls:
            whole = whole_text(session.text_codec, answer.token_ids, session.config.eos_ids)
            before, calls = self._form.split(whole, self._names)
        return (before, calls[: self._most]) if calls else (answer.text, [])

    def _cut(self, piece: Piece) -> int:
        """Return how much of the held text can be shown, and note whether a call has begun."""
        assert self._form is not None
        begin, held = self._form.begin, self._held
        if not begin:
            start = held.lstrip()[:1]
            self._holding = not self._shown and start == "{"
            return 0 if self._holding or (not start and not self._shown) else len(held)
        codec = self._decoder.session.text_codec
        if begin in held:
            self._holding = True
            return held.index(begin)
        if any(codec.hidden_text(token) == begin for token in piece.token_ids):
            self._holding = True
            return len(held) - len(piece.text)
        most = min(len(held), len(begin) - 1)
        return len(held) - next((n for n in range(most, 0, -1) if held.endswith(begin[:n])), 0)
