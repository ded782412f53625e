"""Names of the files of a bundle, and how its JSON files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rk_export.errors import InputError

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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), fix=fix)
    return value
