"""Texts through an encoder bundle: vectors of sentence-transformers' models, labels of classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import Section
from rk_export.runtime.encoder import EncoderSession, unit
from rk_export.runtime.encoder_texts import Batch, EncoderTexts, Pair, Tokens, batches, checked
from rk_export.runtime.label_scores import softmax, text_scores
from rk_export.runtime.providers import Provider

# On a CPU the activations of so many tokens stay in its cache: four times as many took three times as long each.
CACHED_TOKENS = 512


@dataclass(frozen=True)
class Classified:
    """What a classifier says of a text or a pair.

    Args:
        label: The likeliest label by the config's names.
        score: Its score from 0 to 1; of a regression, the number itself.
        scores: Those of all labels, in the order of `Encoder.labels`.
    """

    label: str
    score: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TaggedToken:
    """What a classifier of tokens says of one token.

    Args:
        start: Its first character in the text, behind the prompt.
        end: The character behind its last.
        label: The likeliest label.
        score: Its probability.
    """

    start: int
    end: int
    label: str
    score: float


class Encoder:
    """An open encoder bundle: an embedding model, a classifier or a cross-encoder. Needs no PyTorch.

    Texts that are longer than `longest` tokens are cut there, as sentence-transformers does: at ``max_seq_length`` of
    ``sentence_bert_config.json``, else at the tokenizer's length, and never behind the model's positions.

    Args:
        path: A bundle folder.
        provider: As in `Session.from_pretrained`, like the arguments that follow.
        threads: Of ONNX Runtime.
        accuracy_level: 0 computes products of INT4 and INT8 matrices in floats.
        spinning: Let threads wait busily.
        check: Compare every file with the manifest first.

    Raises:
        InputError: A file is missing or broken, or an option is out of range.
        ProviderError: CUDA was asked for and does not work here.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        accuracy_level: int | None = None,
        spinning: bool = True,
        check: bool = False,
    ) -> None:
        self.session = EncoderSession.from_pretrained(
            path,
            provider=provider,
            threads=threads,
            accuracy_level=accuracy_level,
            spinning=spinning,
            check=check,
        )
        self._folder = self.session.config.folder
        self.files = self.session.files
        self.longest = self.session.longest
        self._together = CACHED_TOKENS if self.session.device == "cpu" else None
        self._texts = EncoderTexts(self._folder, self.longest, self.files.lower_case)

    @property
    def device(self) -> str:
        """Where the graph runs."""
        return self.session.device

    @property
    def prompts(self) -> dict[str, str]:
        """Texts that the model wants in front of a text, by name."""
        return dict(self.files.prompts)

    def encode(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> np.ndarray:
        """Return one vector for each text, float32 [texts, width], in the order of the texts.

        The vector is the graph's ``sentence_embedding``. A bundle of a model without ``modules.json`` has none: then it
        is the mean hidden state over the tokens, as in sentence-transformers.

        Args:
            texts: Any number; longer ones than `longest` tokens are cut.
            batch_size: Most texts that run at once. They are sorted by length, so a batch holds little padding. On a
                CPU several texts have 512 tokens together at most, whose activations stay in its cache.
            normalize: True scales vectors to length 1; None leaves them as the model's modules say.
            prompt: Put in front of every text.
            prompt_name: The same by its name in `prompts`; without either, the model's default prompt.

        Raises:
            InputError: A text is no string or has no tokens, a prompt is not known, the model is a classifier, or
                `normalize` is False and the graph scales to length 1.
        """
        rows = self._rows(texts, batch_size, self.files.prompt(prompt, prompt_name), pairs=False)
        if normalize is False and self._normalizes:
            raise InputError(
                "the graph of this model scales to length 1", where="normalize", fix="drop it, or give True"
            )
        if not rows:
            return np.zeros((0, self.width), np.float32)
        found = np.empty((len(rows), self.width), np.float32)
        for batch in batches(rows, batch_size, self._together):
            found[batch.places] = self.session.sentence_vectors(batch.ids, batch.mask, batch.types)
        return unit(found) if normalize else found

    def logits(
        self, texts: Sequence[str] | Sequence[Pair], *, batch_size: int = 32
    ) -> np.ndarray | list[np.ndarray]:
        """Return what a classifier's head gives.

        Returns:
            Float32 [texts, labels]; of a classifier of tokens a list, [tokens, labels] for each text.

        Raises:
            InputError: A text is no string or pair, or has no tokens, or the model is no classifier. A classifier of
                tokens takes no pairs.
        """
        by_token = self.session.logits_axes == 3
        rows = self._rows(texts, batch_size, pairs=not by_token)
        if by_token:
            return [found for found, _ in self._tokens(rows, batch_size)]
        found = np.zeros((len(rows), len(self.labels)), np.float32)
        for batch in batches(rows, batch_size, self._together):
            found[batch.places] = self._run(batch)
        return found

    def classify(self, texts: Sequence[str] | Sequence[Pair], *, batch_size: int = 32) -> list[Classified]:
        """Return the likeliest label of each text or pair, with its score.

        Scores are those of `text_scores`.

        Args:
            texts: Texts, or pairs: a cross-encoder takes (query, passage).
            batch_size: Texts that run at once.

        Raises:
            InputError: As `logits` and `text_scores`, or the model classifies tokens.
        """
        if self.session.logits_axes == 3:
            raise InputError("this model labels tokens", where=str(self._folder), fix="call tag(texts)")
        logits = self.logits(texts, batch_size=batch_size)
        return [
            self._classified(row) for row in text_scores(np.asarray(logits), self._folder / "config.json")
        ]

    def tag(self, texts: Sequence[str], *, batch_size: int = 32) -> list[list[TaggedToken]]:
        """Return a label for each token of each text, special tokens left out.

        Raises:
            InputError: As `logits`, or the model classifies whole texts.
        """
        if self.session.logits_axes != 3:
            raise InputError("this model labels texts", where=str(self._folder), fix="call classify(texts)")
        rows = self._rows(texts, batch_size, pairs=False)
        return [self._tagged(row, found) for found, row in self._tokens(rows, batch_size)]

    @cached_property
    def width(self) -> int:
        """Elements of a vector."""
        return int(self.session.sentence_vectors(np.zeros((1, 1), np.int64)).shape[1])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels of a classifier, in the order of its logits."""
        named = Section.of_file(self._folder / "config.json").section("id2label").values
        count = int(self.session.logits(np.zeros((1, 1), np.int64)).shape[-1])
        return tuple(str(named.get(str(index), f"LABEL_{index}")) for index in range(count))

    def _rows(self, texts: object, batch_size: int, prompt: str = "", *, pairs: bool = True) -> list[Tokens]:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"{batch_size} texts at once", where="batch_size", fix="give 1 or more")
        given = checked(texts, pairs=pairs)
        return self._texts.encode(given, prompt) if given else []

    def _run(self, batch: Batch) -> np.ndarray:
        return self.session.logits(batch.ids, batch.mask, batch.types)

    def _tokens(self, rows: list[Tokens], batch_size: int) -> Iterator[tuple[np.ndarray, Tokens]]:
        """Yield the logits of each row's tokens with the row, in the order of the rows."""
        found: dict[int, np.ndarray] = {}
        for batch in batches(rows, batch_size, self._together):
            logits = self._run(batch)
            found |= {
                place: row[: len(rows[place].ids)] for place, row in zip(batch.places, logits, strict=True)
            }
        yield from ((found[place], row) for place, row in enumerate(rows))

    def _classified(self, scores: np.ndarray) -> Classified:
        best = int(scores.argmax())
        return Classified(self.labels[best], float(scores[best]), tuple(map(float, scores)))

    def _tagged(self, row: Tokens, logits: np.ndarray) -> list[TaggedToken]:
        scores = softmax(logits)
        return [
            TaggedToken(start, end, self.labels[int(one.argmax())], float(one.max()))
            for one, (start, end) in zip(scores, row.spans, strict=True)
            if end > start
        ]

    @cached_property
    def _normalizes(self) -> bool:
        return self.session.has_vectors and self.files.normalizes
