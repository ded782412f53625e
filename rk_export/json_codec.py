"""Our frozen dataclasses as JSON, and back with the place of what does not fit.

pydantic does the reading, on the dataclasses as they are: no field may be missing or unknown, a number is no string
and a flag is no number. It is imported when something is read, so that `import rk_export` stays light.
"""

from __future__ import annotations

import enum
import json
import math
import reprlib
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from rk_export.errors import InputError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, TypeAdapter
    from pydantic_core import CoreSchema, ErrorDetails

T = TypeVar("T")

_WRITE_AGAIN = "correct it, or write the file again with this rk-export"


class _NonFinite:
    """Reads the strings that stand for floats which JSON does not know."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core.core_schema import no_info_before_validator_function

        return no_info_before_validator_function(_float_of, handler(source))


# A field that may hold an infinity or NaN: `to_json` writes "inf", "-inf" or "nan".
Float = Annotated[float, _NonFinite()]


def to_json(value: Any) -> Any:
    """Return a value as `json.dumps` takes it: dataclasses as objects, tuples as arrays, enumerations by value.

    A field whose metadata say ``saved: False`` is left out; a dataclass with a `json_tag` stands under that name.

    Floats that JSON cannot hold become strings: ``"inf"``, ``"-inf"``, ``"nan"``.
    """
    if is_dataclass(value):
        saved = {
            item.name: to_json(getattr(value, item.name))
            for item in fields(value)
            if item.metadata.get("saved", True)
        }
        tag = getattr(value, "json_tag", None)
        return saved if tag is None else {tag: saved}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(cls: type[T], data: Any, where: str, *, fix: str = _WRITE_AGAIN) -> T:
    """Return the dataclass that `to_json` wrote.

    Args:
        cls: The class; a field without a default is required.
        data: What `json.loads` gave.
        where: The file, for messages; the path inside it is added: ``plan.json: sites[3].rank``.
        fix: What to do about a field that is missing, unknown or of the wrong type.

    Raises:
        InputError: A field is missing, unknown or of the wrong type, or its value is refused.
    """
    from pydantic import ValidationError

    kind: Any = cls
    try:
        # As text, because only there an array is as good as a tuple, and a string as an enumeration.
        (value,) = _reader(kind).validate_json(json.dumps([data]))
    except ValidationError as error:
        raise _refusal(error.errors()[0], where, fix) from error
    found: T = value
    return found


def load_json(path: Path, *, fix: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: No such file, or not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot be read: {reason}", where=str(path), fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=str(path), fix=fix) from error


@cache
def _reader(cls: Hashable) -> TypeAdapter[list[Any]]:
    """Return the reader of a list of `cls`: pydantic lets no one configure a dataclass that stands alone."""
    from pydantic import ConfigDict, TypeAdapter

    listed: Any = list[cls]  # type: ignore[valid-type]
    return TypeAdapter(listed, config=ConfigDict(strict=True, extra="forbid"))


def _float_of(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value


def _refusal(details: ErrorDetails, where: str, fix: str) -> InputError:
    place = f"{where}: {path}" if (path := _path(details["loc"][1:])) else where
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return InputError(
            cause.what,
            where=place if cause.where is None else f"{place}: {cause.where}",
            fix=cause.fix or fix,
        )
    return InputError(_what(details) if cause is None else str(cause), where=place, fix=fix)


def _path(steps: tuple[int | str, ...]) -> str:
    """Return ``sites[3].rank`` for ("sites", 3, "rank")."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _what(details: ErrorDetails) -> str:
    if details["type"] == "missing":
        return "the field is missing"
    if details["type"] == "unexpected_keyword_argument":
        return "there is no such field"
    expected = details["msg"].replace("Input should be", "expected")
    return f"{expected}; found {reprlib.repr(details['input'])}"
