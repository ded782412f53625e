"""Names of the files of a bundle, and how its JSON files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.json_codec import load_json

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one where there is no such file.

    Raises:
        InputError: The file holds something else than a JSON object.
    """
    if not path.is_file():
        return {}
    fix = "repair the file, or write the folder again"
    value = load_json(path, fix=fix)
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), fix=fix)
    return value
