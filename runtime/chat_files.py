"""Where a folder keeps its chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import read_json
from rk_export.runtime.special_tokens import CONFIG_FILE

DEFAULT, TOOL_USE = "default", "tool_use"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
PROCESSOR_FILE = "chat_template.json"
_LARGEST = 1 << 20  # bytes; the longest templates in use have some 20,000


@dataclass(frozen=True)
class TemplateFiles:
    """Texts of chat templates, and the files they came from.

    Args:
        sources: Jinja text by the template's name.
        files: Where each was found.
        folder: The folder that was looked into.
    """

    sources: Mapping[str, str]
    files: Mapping[str, Path]
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> TemplateFiles:
        """Read the first of these that is there.

        1. ``chat_template.jinja`` (named ``default``) and every ``additional_chat_templates/NAME.jinja``;
        2. ``chat_template`` of ``tokenizer_config.json``: a text, or a list of names and texts;
        3. ``chat_template`` of ``chat_template.json``, where processors keep theirs.

        Raises:
            InputError: A file cannot be read, or ``chat_template`` is neither a text nor a list.
        """
        files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
        if (folder / TEMPLATE_FILE).is_file():
            files = {DEFAULT: folder / TEMPLATE_FILE, **files}
        if files:
            return cls({name: _text(path) for name, path in files.items()}, files, folder)
        for path in (folder / CONFIG_FILE, folder / PROCESSOR_FILE):
            sources = _named(read_json(path).get("chat_template"), path)
            if sources:
                return cls(sources, dict.fromkeys(sources, path), folder)
        return cls({}, {}, folder)

    def where(self, name: str) -> str:
        """Return the file of a template, for error messages."""
        return str(self.files.get(name, self.folder))


def _text(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            fix = f"give a text of at most {_LARGEST:,} bytes"
            raise InputError("no file, or too large for a chat template", where=str(path), fix=fix)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path), fix="save it as UTF-8") from error


def _named(value: Any, path: Path) -> dict[str, str]:
    """Return the templates in a field that holds one text, or several with their names."""
    if not value:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    try:
        entries = value if isinstance(value, dict) else {one["name"]: one["template"] for one in value}
    except (KeyError, TypeError):
        entries = {"": None}
    if not all(isinstance(text, str) for pair in entries.items() for text in pair):
        raise InputError(
            "chat_template is neither a text nor a list of objects with name and template",
            where=str(path),
            fix="save the tokenizer again with transformers",
        )
    return dict(entries)
