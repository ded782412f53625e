"""An encoder bundle (BERT-like), opened and ready: hidden states, vectors of texts, logits of heads."""

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
from rk_export.runtime.encoder_graph import LOGITS, STATES, VECTOR, is_encoder
from rk_export.runtime.graph_proto import read_facts
from rk_export.runtime.providers import Provider, SessionSettings, device_of, open_session
from rk_export.runtime.sentence_files import SentenceFiles
from rk_export.runtime.text import TextCodec
from rk_export.runtime.token_gate import TokenGate


class EncoderSession:
    """One open encoder bundle: tokens in, arrays out. `Encoder` takes texts.

    Args:
        session: An open ``onnxruntime.InferenceSession``.
        config: The bundle's configuration.

    Raises:
        InputError: The graph is that of a decoder.
    """

    def __init__(self, session: Any, config: BundleConfig) -> None:
        self.config = config
        self.device = device_of(session)
        self._session = session
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = {value.name: value for value in session.get_outputs()}
        if not is_encoder(self._inputs, self._outputs):
            raise InputError(
                f"no output {STATES} or {LOGITS} of an encoder",
                where=str(config.model_path),
                fix="open decoders with Session",
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

    @cached_property
    def longest(self) -> int | None:
        """Most tokens of a text that is embedded, special tokens included; None where no file says so.

        It is ``max_seq_length`` of ``sentence_bert_config.json``, else the tokenizer's length, and never more than the
        model has positions.
        """
        limits = (self.files.longest, self.config.context_length)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def has_vectors(self) -> bool:
        """Whether the graph makes the vector of a text itself."""
        return VECTOR in self._outputs

    @property
    def has_logits(self) -> bool:
        """Whether the graph has a head that classifies; it gives no hidden states then."""
        return LOGITS in self._outputs

    @property
    def logits_axes(self) -> int:
        """Axes of the logits: 2 with one row of them for a text, 3 with one for each token."""
        return len(self._output(LOGITS).shape)

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
            InputError: A token has no row in the embedding, a row has more tokens than the model has positions, or
                the graph gives logits instead.
        """
        return self._run(STATES, input_ids, attention_mask, token_type_ids)

    def logits(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        token_type_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return what a head gives, float32: [batch, labels], or [batch, length, labels] for each token.

        Raises:
            InputError: As `forward`, or the graph has no such head.
        """
        return self._run(LOGITS, input_ids, attention_mask, token_type_ids).astype(np.float32)

    def sentence_vectors(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        token_type_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return one vector for each row, float32 [batch, width].

        It is the graph's ``sentence_embedding``, pooled and scaled as the model's modules say. Where a bundle has none,
        it is the mean hidden state over the tokens.

        Raises:
            InputError: As `forward`.
        """
        if self.has_vectors:
            return self._run(VECTOR, input_ids, attention_mask, token_type_ids)
        hidden = self.forward(input_ids, attention_mask, token_type_ids).astype(np.float32)
        if attention_mask is None:
            return np.asarray(hidden.mean(axis=1))
        mask = attention_mask.astype(np.float32)
        total = np.maximum(mask.sum(axis=1, keepdims=True), 1)
        return np.asarray(np.einsum("bl,blh->bh", mask, hidden) / total)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one unit vector per text, float32 [texts, width]: `sentence_vectors` scaled to length 1.

        Raises:
            InputError: No texts were given, or one is empty, has a token without a row in the embedding, or more than
                `longest` tokens.
        """
        return self.embed_tokens([self.tokens(text) for text in texts])

    def tokens(self, text: str, prompt_name: str | None = None) -> list[int]:
        """Return the tokens of a text behind a prompt: the one that is named, else the model's default prompt.

        Raises:
            InputError: There is no prompt of that name, or the text is not UTF-8.
        """
        whole = self.files.prompt(None, prompt_name) + text
        return self.text_codec.encode(whole.lower() if self.files.lower_case else whole)

    def embed_tokens(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return what `embed` returns for texts that are tokens already, special tokens included.

        Raises:
            InputError: As `embed`.
        """
        named = replace(self._gate, limit=None, text_of=self.text_codec.token_text)
        for index, row in enumerate(rows):
            named.check(row, where=f"text {index}")
        for index, row in enumerate(rows):
            if (fix := self.refusal(row)) is not None:
                raise InputError(f"text {index} has {len(row)} tokens", where="texts", fix=fix)
        if not rows:
            raise InputError("there are none", where="texts", fix="give one or more")
        return unit(self.sentence_vectors(*padded(rows)))

    def refusal(self, row: Sequence[int]) -> str | None:
        """Return which number of tokens a text may have, where it has another one; else None."""
        if row and (self.longest is None or len(row) <= self.longest):
            return None
        return "give 1 or more" if self.longest is None else f"give 1 to {self.longest}"

    def _run(
        self, output: str, ids: np.ndarray, mask: np.ndarray | None, types: np.ndarray | None
    ) -> np.ndarray:
        self._output(output)
        self._gate.check(ids)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids) if mask is None else mask,
            "token_type_ids": np.zeros_like(ids) if types is None else types,
        }
        feeds = {name: value.astype(np.int64) for name, value in given.items() if name in self._inputs}
        found: np.ndarray = self._session.run([output], feeds)[0]
        return found

    def _output(self, name: str) -> Any:
        if name not in self._outputs:
            there = ", ".join(self._outputs)
            raise InputError(
                f"no output {name}, it gives {there}",
                where=str(self.config.model_path),
                fix="use a bundle of another model, or what this one gives",
            )
        return self._outputs[name]

    @cached_property
    def _gate(self) -> TokenGate:
        rows = read_facts(self.config.model_path).embedding_rows
        return TokenGate(self.config.vocab_size if rows is None else rows, self.config.context_length)

    @cached_property
    def files(self) -> SentenceFiles:
        """What the bundle says about texts as vectors."""
        return SentenceFiles.read(self.config.folder)

    @cached_property
    def text_codec(self) -> TextCodec:
        """The bundle's tokenizer."""
        return TextCodec(self.config.folder / TOKENIZER_FILE)


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of tokens as ids and mask, int64 [rows, longest], padded on the right with 0."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return ids, mask


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [texts, width] scaled to length 1; a vector of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)
