"""The special tokens of a folder by name, text and id, read from the tokenizer's JSON files as transformers does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import TOKENIZER_FILE, read_json

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer keeps beside its ordinary vocabulary.

    Args:
        folder: The folder it was read from.
        named: Texts by name, such as ``bos_token``, the model's own (``image_token``) included; names without a
            token are absent.
        named_in: File that names each of them.
    """

    folder: Path
    named: Mapping[str, str]
    named_in: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> SpecialTokens:
        """Read ``tokenizer_config.json`` and ``special_tokens_map.json``; absent files name nothing.

        The map overrides the config. Where the config lists ``added_tokens_decoder``, transformers passes the map
        over, and so does this.

        Raises:
            InputError: A file is no JSON object.
        """
        config = read_json(folder / CONFIG_FILE)
        files = {CONFIG_FILE: config}
        if "added_tokens_decoder" not in config:
            files[MAP_FILE] = read_json(folder / MAP_FILE)
        named: dict[str, str] = {}
        named_in: dict[str, str] = {}
        for file, values in files.items():
            for name, value in _name_fields(values).items():
                text = token_text(value)
                if text is None:
                    named.pop(name, None)
                else:
                    named[name], named_in[name] = text, file
        return cls(folder, named, named_in)

    def id_of(self, text: str) -> int | None:
        """Return the id of a token, or None where the tokenizer has no such token."""
        index = self.added.get(text, self._vocabulary.get(text))
        return index if isinstance(index, int) else None

    @cached_property
    def added(self) -> dict[str, int]:
        """Ids of the tokens that are matched in a text before it is split, by their texts.

        ``tokenizer.json`` goes first, since it is what encodes; the older files may know more.

        Raises:
            InputError: A list of tokens is malformed.
        """
        decoder = read_json(self.folder / CONFIG_FILE).get("added_tokens_decoder") or {}
        older = read_json(self.folder / "added_tokens.json")
        with self._malformed_lists():
            listed = {entry["content"]: entry["id"] for entry in _listed(self._tokenizer)}
            configured = {entry["content"]: int(index) for index, entry in decoder.items()}
            found = {**{text: int(index) for text, index in older.items()}, **configured, **listed}
            return {str(text): index for text, index in found.items()}

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        return read_json(self.folder / TOKENIZER_FILE)

    @cached_property
    def _vocabulary(self) -> dict[str, Any]:
        model = self._tokenizer.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        with self._malformed_lists():
            if isinstance(vocabulary, list):  # Unigram: pairs of text and score, in the order of their ids
                return {pair[0]: index for index, pair in enumerate(vocabulary)}
        return vocabulary if isinstance(vocabulary, dict) else {}

    @contextmanager
    def _malformed_lists(self) -> Iterator[None]:
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"a list of its tokens is malformed ({error!r})",
                where=str(self.folder),
                fix=f"give {TOKENIZER_FILE} and {CONFIG_FILE} as transformers saves them",
            ) from error


def listed_tokens(folder: Path) -> list[dict[str, Any]]:
    """Return the added tokens of ``tokenizer.json``: objects with at least ``content``, a text, and ``id``, a number.

    Raises:
        InputError: The list is malformed.
    """
    try:
        return _listed(read_json(folder / TOKENIZER_FILE))
    except TypeError as error:
        raise InputError(
            f"a list of its tokens is malformed ({error})",
            where=str(folder / TOKENIZER_FILE),
            fix="give the file as transformers saves it",
        ) from error


def _listed(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = tokenizer.get("added_tokens") or []
    if not isinstance(listed, list) or not all(map(_is_added, listed)):
        raise TypeError("added_tokens is no list of objects with content and id")
    return listed


def _is_added(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int


def _name_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a file that may name a token; flags such as ``add_bos_token`` are among them."""
    more = values.get("extra_special_tokens")
    named = {name: value for name, value in values.items() if name.endswith("_token")}
    return {**named, **(more if isinstance(more, dict) else {})}


def token_text(value: Any) -> str | None:
    """Return the text of a token as JSON files write it: a string, or an object with ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None
