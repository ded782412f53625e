"""Whether a model folder is that of an embedding model, as sentence-transformers writes it."""

from __future__ import annotations

from pathlib import Path

from rk_export.errors import InputError
from rk_export.json_codec import load_json

MODULES = "modules.json"


def is_embedder(folder: Path) -> bool:
    """Whether a folder names modules that pool hidden states: its decoder then gives these, and no next token.

    Raises:
        InputError: The file is no list of modules.
    """
    path = folder / MODULES
    if not path.is_file():
        return False
    modules = load_json(path, fix="repair the file, or remove it")
    if not isinstance(modules, list) or not all(isinstance(item, dict) for item in modules):
        raise InputError("is no list of modules", where=str(path), fix="repair the file, or remove it")
    return any(str(item.get("type", "")).rpartition(".")[2] == "Pooling" for item in modules)
