"""Names of the files of a bundle, and how its JSON files are read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.json_codec import load_json

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
_REPAIR = "repair the file, or write the folder again"
_MOST = (1 << 63) - 1


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one where there is no such file.

    Raises:
        InputError: The file holds something else than a JSON object.
    """
    if not path.is_file():
        return {}
    value = load_json(path, fix=_REPAIR)
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), fix=_REPAIR)
    return value


@dataclass(frozen=True)
class Section:
    """An object in a JSON file of a bundle, whose fields are asked for by type.

    Args:
        values: Its fields.
        where: File and path of the object, for messages.
    """

    values: Mapping[str, Any]
    where: str

    @classmethod
    def of_file(cls, path: Path) -> Section:
        """Return the object in a file; an empty one where there is no such file.

        Raises:
            InputError: The file holds something else.
        """
        return cls(read_json(path), str(path))

    def section(self, name: str) -> Section:
        """Return an object inside this one; an empty one where it is absent or null.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._refusal(name, "an object")
        return Section(value or {}, f"{self.where}: {name}")

    def count(self, name: str) -> int | None:
        """Return a number of things, 1 or more; None where it is absent or null.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(name)
        if value is not None and not is_count(value):
            raise self._refusal(name, "a whole number from 1 on")
        return value

    def flag(self, name: str) -> bool | None:
        """Return a truth value; None where it is absent or null.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._refusal(name, "true or false")
        return value

    def _refusal(self, name: str, wanted: str) -> InputError:
        found = reprlib.repr(self.values[name])
        return InputError(f"{name} is {found}, {wanted} was expected", where=self.where, fix=_REPAIR)


def is_count(value: object) -> bool:
    """Whether a value of a JSON file is a number of things that this machine can count."""
    return type(value) is int and 0 < value <= _MOST
