"""The tokenizer of a bundle: the source's files, completed by what transformers knows beside them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rk_export.inside import copy_inside
from rk_export.runtime.bundle_files import TOKENIZER_FILE, read_json
from rk_export.runtime.chat_files import MORE_TEMPLATES, PROCESSOR_FILE, TEMPLATE_FILE, TemplateFiles
from rk_export.runtime.special_tokens import CONFIG_FILE, MAP_FILE, SpecialTokens, listed_tokens
from rk_export.runtime.text import open_tokenizer
from rk_export.source.tokenizer_conversion import convert_tokenizer, open_with_transformers, present_files

logger = logging.getLogger(__name__)

# Where tokenizers part: spaces at the front and in rows, tabs, line breaks, letters beyond ASCII.
_COMPARED = ("A plain sentence, with 12 words.", "  two  spaces\n\n\tand a tab ", "naïve 中文 🙂")


def copy_tokenizer(source: Path, folder: Path, *, types: bool = False) -> None:
    """Copy a model folder's tokenizer, converted to ``tokenizer.json`` if need be; having none is a warning.

    Args:
        source: The model's folder.
        folder: Where the files go.
        types: The graph takes the types of tokens, which tell a pair's texts apart.

    Raises:
        InputError: The tokenizer cannot be converted, or one of its files is malformed.
    """
    templates = [name for name in (TEMPLATE_FILE, PROCESSOR_FILE) if (source / name).is_file()]
    present = present_files(source)
    if not present:
        logger.warning("%s holds no tokenizer: the bundle takes token ids only", source)
        return
    for name in (*present, *templates):
        copy_inside(source, name, folder)
    for path in (source / MORE_TEMPLATES).glob("*.jinja"):
        copy_inside(source, f"{MORE_TEMPLATES}/{path.name}", folder)
    _complete(folder, source)
    _move_processor_template(folder)
    _name_known_class(folder / CONFIG_FILE, types)


def _complete(folder: Path, source: Path) -> None:
    """Add what transformers makes of the files: ``tokenizer.json``, missing tokens, and the class's own names."""
    if not (folder / TOKENIZER_FILE).is_file():  # GenAI and `tokenizers` read this file only
        convert_tokenizer(source, folder)
    try:
        tokenizer = open_with_transformers(source)
    except Exception as error:  # tokenizers raises bare Exception, transformers whatever its parsers do
        logger.warning(
            "%s: transformers cannot open the tokenizer (%s); its files are taken as they are",
            source,
            _first_line(error),
        )
        return
    missing = _missing_tokens(folder, tokenizer)
    if missing:
        logger.warning("%s lacks the added tokens %s: written anew", TOKENIZER_FILE, ", ".join(missing))
        tokenizer.save_pretrained(folder)
    _name_tokens(folder, tokenizer.special_tokens_map)
    _compare(folder, source, tokenizer)


def _compare(folder: Path, source: Path, tokenizer: Any) -> None:
    """Warn where transformers makes other tokens of a text than ``tokenizer.json``, which all runtimes read."""
    plain = open_tokenizer(folder / TOKENIZER_FILE)
    plain.no_truncation()
    plain.no_padding()
    for text in _COMPARED:
        if list(tokenizer(text)["input_ids"]) != plain.encode(text).ids:
            logger.warning(
                "%s: transformers makes other tokens of %r than %s, which the bundle's runtimes read: its class %s "
                "builds the tokenizer in its own way",
                source,
                text,
                TOKENIZER_FILE,
                type(tokenizer).__name__,
            )
            return


def _missing_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """Return the tokens that ``tokenizer.json`` would split, though the model's other files know them."""
    special = SpecialTokens.read(folder)
    named = {text: special.id_of(text) for text in special.named.values()}
    every = {**named, **special.added}
    listed = {entry["content"] for entry in listed_tokens(folder)}
    known = tokenizer.get_added_vocab()
    return [text for text, index in every.items() if text not in listed and known.get(text) == index]


def _name_tokens(folder: Path, named: dict[str, str]) -> None:
    """Let the files name the special tokens as transformers does, where a name is a default of the class."""
    found = SpecialTokens.read(folder).named
    names = sorted({*named, *found})
    changes = {name: named.get(name) for name in names if named.get(name) != found.get(name)}
    for file in (CONFIG_FILE, MAP_FILE):
        if changes and (file == CONFIG_FILE or (folder / file).is_file()):
            _write_json(folder / file, read_json(folder / file) | changes)


def _move_processor_template(folder: Path) -> None:
    """Put a template that only processors look for where tokenizers do."""
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        return
    files = TemplateFiles.read(folder)
    if set(files.files.values()) == {path} and len(files.sources) == 1:
        (text,) = files.sources.values()
        (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
        path.unlink()


def _name_known_class(path: Path, types: bool) -> None:
    """Replace the class name that only transformers 5 knows, so that older loaders take the file too."""
    values = read_json(path)
    for private in ("is_local", "local_files_only", "name_or_path"):
        values.pop(private, None)
    if values.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # This class makes token_type_ids unless told otherwise, and no decoder graph takes them.
        inputs = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
        values.setdefault("model_input_names", inputs)
    _write_json(path, values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
