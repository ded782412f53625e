"""An encoder bundle (BERT-like), opened and ready: hidden states and sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rk_export.errors import InputError
from rk_export.manifest import check_manifest
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.graph_proto import read_facts
from rk_export.runtime.providers import Provider, SessionSettings, device_of, open_session
from rk_export.runtime.text import TextCodec
from rk_export.runtime.token_gate import TokenGate

_OUTPUT = "last_hidden_state"


class EncoderSession:
    """One open encoder bundle.

    Args:
        session: An open ``onnxruntime.InferenceSession``.
        config: The bundle's configuration.

    Raises:
        InputError: The graph gives no ``last_hidden_state``.
    """

    def __init__(self, session: Any, config: BundleConfig) -> None:
        self.config = config
        self.device = device_of(session)
        self._session = session
        self._inputs = {value.name for value in session.get_inputs()}
        if _OUTPUT not in {value.name for value in session.get_outputs()}:
            raise InputError(
                f"no output {_OUTPUT}", where=str(config.model_path), fix="open decoders with Session"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        accuracy_level: int | None = None,
        spinning: bool = True,
        check: bool = False,
    ) -> EncoderSession:
        """Open a bundle folder; the arguments are those of ``Session.from_pretrained``.

        Raises:
            InputError: A file is missing or broken, or an option out of range.
            ProviderError: CUDA was asked for and does not work here.
        """
        if check:
            check_manifest(path)
        config = BundleConfig.read(path)
        settings = SessionSettings(provider, threads, accuracy_level, spinning)
        return cls(open_session(config.model_path, settings), config)

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        token_type_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the last hidden state, [batch, length, hidden].

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, length], 0 at padding; None masks nothing.
            token_type_ids: [batch, length]; None means zeros.

        Raises:
            InputError: A token has no row in the embedding, or a row more tokens than the model has positions.
        """
        self._gate.check(input_ids)
        given = {
            "input_ids": input_ids,
            "attention_mask": np.ones_like(input_ids) if attention_mask is None else attention_mask,
            "token_type_ids": np.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        feeds = {name: value.astype(np.int64) for name, value in given.items() if name in self._inputs}
        hidden: np.ndarray = self._session.run([_OUTPUT], feeds)[0]
        return hidden

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one unit vector per text: the mean hidden state over its tokens; float32 [texts, hidden].

        Raises:
            InputError: No texts were given, or one is empty, has a token without a row in the embedding, or more
                tokens than the model has positions.
        """
        return self.embed_tokens([self.text_codec.encode(text) for text in texts])

    def embed_tokens(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return what `embed` returns for texts that are tokens already, special tokens included.

        Raises:
            InputError: As `embed`.
        """
        named = replace(self._gate, limit=None, text_of=self.text_codec.token_text)
        for index, row in enumerate(rows):
            named.check(row, where=f"text {index}")
        longest = max(map(len, rows), default=0)
        limit = self.config.context_length
        if longest == 0 or (limit is not None and longest > limit):
            raise InputError(
                f"the longest has {longest} tokens", where="texts", fix=f"give texts of 1 to {limit} tokens"
            )
        input_ids = np.array([[*row, *[0] * (longest - len(row))] for row in rows], np.int64)
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
        hidden = self.forward(input_ids, mask).astype(np.float32)
        mean = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True), np.float32)

    @cached_property
    def _gate(self) -> TokenGate:
        rows = read_facts(self.config.model_path).embedding_rows
        return TokenGate(self.config.vocab_size if rows is None else rows, self.config.context_length)

    @cached_property
    def text_codec(self) -> TextCodec:
        """The bundle's tokenizer."""
        return TextCodec(self.config.folder / TOKENIZER_FILE)
