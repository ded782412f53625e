"""The tokens at which a generation ends, merged from every file that names one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import read_json
from rk_export.runtime.chat import ChatTemplate
from rk_export.runtime.chat_files import TemplateFiles
from rk_export.runtime.special_tokens import MAP_FILE, SpecialTokens, token_text

_FIELD = "eos_token_id"
# Stand for a question and an answer while the template shows what it writes behind the latter.
_QUESTION, _ANSWER = "rkQuestion", "rkAnswer"


@dataclass(frozen=True)
class Ends:
    """Tokens that end a generation.

    Args:
        named_in: The places that name each token; the order is that in which the places were read.
        texts: How the tokenizer writes a token, where it says so.
        ignored: What names an end that cannot be one, and why.
    """

    named_in: Mapping[int, tuple[str, ...]]
    texts: Mapping[int, str]
    ignored: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens, those of ``generation_config.json`` first."""
        return tuple(self.named_in)

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The tokens in the form of a ``generation_config.json``."""
        return self.ids[0] if len(self.ids) == 1 else list(self.ids) or None

    @property
    def labels(self) -> tuple[str, ...]:
        """The tokens for people: text and id."""
        return tuple(
            f"`{self.texts[end]}` ({end})" if end in self.texts else f"token {end}" for end in self.ids
        )


def read_ends(folder: Path) -> Ends:
    """Merge the ends that a folder's files name.

    transformers ends where ``generation_config.json`` says, or ``config.json`` where the former says nothing. Chat
    models are often saved with another end in the tokenizer (``eos_token``) or only in the chat template, which
    writes it behind every answer. All of them end a generation. ``config.json`` beside a ``generation_config.json``
    counts only with tokens that the tokenizer keeps apart: many models carry the default of their class there,
    which may be an ordinary word. ``genai_config.json`` counts where neither names an end.

    Raises:
        InputError: A file is malformed, or names something else than token ids.
    """
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    models = [*([text_config] if isinstance(text_config, dict) else []), config]
    vocab_size = next((size for model in models if isinstance(size := model.get("vocab_size"), int)), None)
    found = _Found(SpecialTokens.read(folder), vocab_size)
    found.add_ids("generation_config.json", read_json(folder / "generation_config.json").get(_FIELD))
    decided = bool(found.named_in)
    for model in models:
        found.add_ids("config.json", model.get(_FIELD), only_added=decided)
    if not found.named_in:
        genai = read_json(folder / "genai_config.json").get("model")
        found.add_ids("genai_config.json", genai.get(_FIELD) if isinstance(genai, dict) else None)
    found.add_tokenizer()
    found.add_end_of_turn(folder)
    return found.ends()


class _Found:
    """Collects ends while the places are read in turn."""

    def __init__(self, tokens: SpecialTokens, vocab_size: int | None) -> None:
        self.named_in: dict[int, tuple[str, ...]] = {}
        self._tokens, self._vocab_size = tokens, vocab_size
        self._texts: dict[int, str] = {}
        self._ignored: list[str] = []

    def ends(self) -> Ends:
        texts = {token: text for text, token in self._tokens.added.items()} | self._texts
        known = {token: texts[token] for token in self.named_in if token in texts}
        return Ends(self.named_in, known, tuple(self._ignored))

    def add_ids(self, place: str, value: Any, *, only_added: bool = False) -> None:
        for token in token_ids(value, str(self._tokens.folder / place)):
            if token < 0 or (self._vocab_size is not None and token >= self._vocab_size):
                self._ignored.append(
                    f"{place} names {_FIELD} {token}, outside a vocabulary of {self._vocab_size}"
                )
            elif not only_added or token in self.named_in or token in self._tokens.added.values():
                self._add(token, place)
            else:
                self._ignored.append(
                    f"{place} names {_FIELD} {token}, which neither generation_config.json names nor the tokenizer "
                    "keeps apart from words"
                )

    def add_tokenizer(self) -> None:
        """Add ``eos_token``; the map of special tokens counts even where transformers passes it over."""
        named = {MAP_FILE: token_text(read_json(self._tokens.folder / MAP_FILE).get("eos_token"))}
        if "eos_token" in self._tokens.named:
            named = {self._tokens.named_in["eos_token"]: self._tokens.named["eos_token"], **named}
        for file, text in named.items():
            if text is not None:
                self._add_text(f"{file} (eos_token)", text)

    def add_end_of_turn(self, folder: Path) -> None:
        """Add the first token that the chat template writes behind an answer."""
        try:
            if not TemplateFiles.read(folder).sources:
                return
            behind = next(_behind_answer(ChatTemplate.read(folder)), None)
        except InputError as error:  # a prompt without a template can be continued all the same
            self._ignored.append(f"the chat template cannot be used: {error.what}")
            return
        if behind is None:
            self._ignored.append("the chat template does not show what it writes behind an answer")
            return
        text = _first_token(behind, self._tokens.added)
        if text is not None:
            self._add_text("chat template (end of turn)", text)

    def _add_text(self, place: str, text: str) -> None:
        token = self._tokens.id_of(text)
        if token is None:
            self._ignored.append(f"{place} names {text!r}, which the tokenizer does not have")
        elif self._vocab_size is not None and token >= self._vocab_size:
            self._ignored.append(
                f"{place} names {text!r} ({token}), outside a vocabulary of {self._vocab_size}"
            )
        else:
            self._texts[token] = text
            self._add(token, place)

    def _add(self, token: int, place: str) -> None:
        self.named_in[token] = (*self.named_in.get(token, ()), place)


def token_ids(value: Any, where: str) -> list[int]:
    """Return the ids in a field that holds one, several or none.

    Raises:
        InputError: It holds something else.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in values):
        raise InputError(
            f"{_FIELD} is {value!r}", where=where, fix="give the id of a token, or a list of such ids"
        )
    return values


def _behind_answer(template: ChatTemplate) -> Iterator[str]:
    """Yield what a template writes behind the last answer; nothing where it refuses the question."""
    for wrap in (str, _text_block):
        chat = [
            {"role": "user", "content": wrap(_QUESTION)},
            {"role": "assistant", "content": wrap(_ANSWER)},
        ]
        try:
            _, found, behind = template.render(chat, add_generation_prompt=False).rpartition(_ANSWER)
        except InputError:
            continue
        if found:
            yield behind


def _text_block(text: str) -> list[dict[str, str]]:
    """Return a content in the form that multimodal templates take."""
    return [{"type": "text", "text": text}]


def _first_token(text: str, added: Mapping[str, int]) -> str | None:
    """Return the added token that comes first in a text; of two at the same place, the longer."""
    places = [(text.find(token), -len(token), token) for token in added if token.strip() and token in text]
    return min(places)[2] if places else None
