"""The tokenizer of a model folder in the one form that every runtime reads: tokenizer.json."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from rk_export.errors import InputError
from rk_export.json_codec import load_json
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.special_tokens import CONFIG_FILE, MAP_FILE
from rk_export.runtime.text import open_tokenizer, panics_are_errors

TOKENIZER_FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    MAP_FILE,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
_VOCABULARIES = (*_SENTENCEPIECE_FILES, "vocab.json", "vocab.txt")
_FIX = "add the fast tokenizer's tokenizer.json to the model folder"


def present_files(source: Path) -> list[str]:
    """Return the names of the tokenizer files in a model folder."""
    return [name for name in TOKENIZER_FILES if (source / name).is_file()]


def check_tokenizer(source: Path, vocabulary: int) -> None:
    """Refuse, before any work, a tokenizer that a bundle could not carry; a folder without one passes.

    Args:
        source: The model folder.
        vocabulary: Number of token ids that the model embeds.

    Raises:
        InputError: If tokenizer.json is broken, or what lies there instead cannot be converted to it.
    """
    if not present_files(source):
        return
    if (source / TOKENIZER_FILE).is_file():
        open_tokenizer(source / TOKENIZER_FILE)
        return
    with TemporaryDirectory() as folder:
        convert_tokenizer(source, Path(folder))
        known = open_tokenizer(Path(folder) / TOKENIZER_FILE).get_vocab_size()
    # transformers makes a tokenizer of nothing but special tokens from an empty file.
    if 2 * known < vocabulary:
        raise InputError(
            f"the tokenizer converts to one of {known} tokens, the model embeds {vocabulary}",
            where=str(source / _vocabulary_file(source)),
            fix=f"{_FIX}; a damaged file: download it again",
        )


def convert_tokenizer(source: Path, folder: Path) -> None:
    """Convert the tokenizer of a model folder, and save it with its tokenizer.json into another folder.

    Raises:
        InputError: If it cannot be converted.
    """
    name = _vocabulary_file(source)
    if name in _SENTENCEPIECE_FILES and importlib.util.find_spec("sentencepiece") is None:
        raise InputError(
            "converting it needs the package sentencepiece, which is not installed",
            where=str(source / name),
            fix=f"pip install sentencepiece; or {_FIX}",
        )
    try:
        tokenizer = open_with_transformers(source)
        tokenizer.save_pretrained(folder)
        open_tokenizer(folder / TOKENIZER_FILE)
    except Exception as error:  # each tokenizer library raises exceptions of its own, some of them bare
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the tokenizer cannot be converted to tokenizer.json ({reason})",
            where=str(source / name),
            fix=f"{_FIX}; a damaged file: download it again",
        ) from error


def open_with_transformers(source: Path) -> Any:
    """Return transformers' tokenizer of a model folder; it raises whatever its parsers do, but no panic.

    Raises:
        InputError: A JSON file is beyond the bounds of every such file that is read.
    """
    for name in present_files(source):
        if name.endswith(".json"):
            load_json(source / name, fix="download it again")
    with panics_are_errors():
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def _vocabulary_file(source: Path) -> str:
    present = present_files(source)
    name = next((name for name in _VOCABULARIES if name in present), None)
    if name is None:
        raise InputError(
            f"no vocabulary: the tokenizer is {', '.join(present)} alone", where=str(source), fix=_FIX
        )
    return name
