"""Answers that keep a JSON schema: llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rk_export.errors import InputError, RkExportError
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.server.errors import bad_request

_WORD = 32  # tokens of one element of the bit mask
_MOST_BYTES = 1 << 16  # of a schema: the time to compile one can grow with the square of its length
# Between two elements: small models that may write more never come to an end.
_FORM: Any = {"whitespace_pattern": r"\n?[ ]{0,12}"}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class SchemaTooComplexError(RkExportError):
    """A schema that was taken has become too complex to follow; ``where`` is the field that holds it."""


class GrammarTokens:
    """The tokenizer of a bundle as llguidance reads it.

    Args:
        folder: The bundle.
        rows: Rows of the embedding, or None where nothing tells.
        ends: Tokens that end an answer.

    Raises:
        InputError: llguidance cannot read the tokenizer.
    """

    def __init__(self, folder: Path, rows: int | None, ends: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        text = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        try:
            self.tokens = LLTokenizer(text, eos_token=list(ends) or None)
            if rows is not None and rows > self.tokens.vocab_size:
                self.tokens = LLTokenizer(text, n_vocab=rows, eos_token=list(ends) or None)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"no grammar can be kept with this tokenizer ({error})", fix="ask for plain text"
            ) from error

    def constraint(self, schema: dict[str, Any], param: str) -> JsonConstraint:
        """Return a fresh constraint to the JSON of a schema.

        Args:
            schema: The JSON schema.
            param: The field that holds it, for messages.

        Raises:
            ApiError: The schema is none, too long, or one that llguidance does not support.
        """
        from llguidance import LLMatcher

        text = json.dumps(schema, ensure_ascii=False)
        if (size := len(text.encode("utf-8", "replace"))) > _MOST_BYTES:
            raise bad_request(
                f"the schema has {size} bytes, at most {_MOST_BYTES} are taken", param, "invalid_schema"
            )
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=_FORM)
            # It would write its warnings between the lines of the log.
            matcher = LLMatcher(self.tokens, grammar, log_level=0)
            problem = _problem(matcher) if matcher.is_error() else ""
        except (ValueError, RuntimeError, RecursionError) as error:
            problem = str(error).partition("\n")[0]
        if problem:
            raise bad_request(f"the schema cannot be kept: {problem}", param, "invalid_schema")
        return JsonConstraint(matcher, self.tokens.vocab_size, param)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token stands for."""
        return bytes(self.tokens.decode_bytes([token]))


class JsonConstraint:
    """Which tokens may come next in one answer; a `Constraint` of the engine.

    Args:
        matcher: An ``llguidance.LLMatcher`` at its start.
        vocabulary: Tokens that it knows.
        param: The field that holds the schema.
    """

    def __init__(self, matcher: Any, vocabulary: int, param: str) -> None:
        self._matcher, self._vocabulary, self._param = matcher, vocabulary, param
        self._bits = np.empty((1, -(-vocabulary // _WORD)), np.int32)

    def copy(self) -> JsonConstraint:
        """Return a constraint that goes on from here by itself; the grammar is not compiled again."""
        return JsonConstraint(self._matcher.deep_copy(), self._vocabulary, self._param)

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Return logits [vocabulary] with -inf for every token that may not come next.

        Raises:
            SchemaTooComplexError: The grammar has become too large to follow.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits, 0)
        if self._matcher.is_error():
            reason = str(self._matcher.get_error()).partition("\n")[
                0
            ]  # the grammar stands in the lines below
            raise SchemaTooComplexError(f"the schema is too complex to follow: {reason}", where=self._param)
        allowed = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        masked = np.full_like(logits, -np.inf)
        known = len(allowed)
        np.copyto(masked[:known], logits[:known], where=allowed)
        return masked

    def accept(self, token: int) -> None:
        """Take note of the chosen token."""
        self._matcher.consume_token(token)


def _problem(matcher: Any) -> str:
    """Return what is wrong in one line; the whole grammar may stand in those below."""
    return str(matcher.get_error()).partition("\n")[0] or "no reason is known"
