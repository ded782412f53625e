"""Bodies of requests: JSON within bounds, as a model of pydantic."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails
from starlette.requests import Request

from rk_export.errors import InputError
from rk_export.json_codec import parse_json
from rk_export.runtime.server.errors import ApiError, bad_request

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    """Base of what clients send: no unknown fields, and a number is no string."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, values: Any) -> Any:
        """Leave one unknown field: pydantic would make an error of each, and a body can hold hundreds of thousands."""
        if not isinstance(values, dict):
            return values
        known = cls.known_fields()
        unknown = [name for name in values if name not in known]
        return {name: values[name] for name in (*(known & values.keys()), *unknown[:1])}

    @classmethod
    def known_fields(cls) -> set[str]:
        """Return the names of the fields as clients write them."""
        return {field.alias or name for name, field in cls.model_fields.items()}


async def read(request: Request, kind: type[T]) -> T:
    """Return the body of a request.

    Raises:
        ApiError: It is no JSON, lies about its type, or has fields that are unknown or of a wrong type.
    """
    given = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if given != "application/json":
        raise ApiError(415, f"the body is {given!r}; send application/json", code="unsupported_media_type")
    return await asyncio.to_thread(parse, await request.body(), kind)


def parse(body: bytes, kind: type[T]) -> T:
    """Return the model of a body.

    Raises:
        ApiError: As `read`.
    """
    value = parse_object(body)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise misfit(error, value) from error
    except (OverflowError, RecursionError) as error:
        raise bad_request("a number or a nesting is out of range") from error


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        ApiError: It is something else, or too deep.
    """
    try:
        value = parse_json(body, where=None, fix="send a JSON object")
    except InputError as error:
        raise bad_request(
            f"the body is no JSON that can be read: {error.what}", code="invalid_json"
        ) from error
    if not isinstance(value, dict):
        raise bad_request("the body is no JSON object", code="invalid_json")
    return value


def misfit(error: ValidationError, value: Any = None) -> ApiError:
    """Return what the first misfit of a body is, with its place.

    Args:
        error: What pydantic found.
        value: What it was given; with it, the place leaves out the branches of a union, which are no fields.
    """
    found = [(_place(one, value), one) for one in error.errors(include_url=False, include_input=False)]
    # A union reports every alternative; an unknown field explains more than what is missing.
    for place, one in found:
        if one["type"] == "extra_forbidden":
            name = _written(place)
            return bad_request(f"{name} is not known or not supported", name, "unknown_parameter")
    # The branch that got furthest is the one that was meant.
    same_field = [one for one in found if one[0][:1] == found[0][0][:1]]
    furthest = max((place for place, _ in same_field), key=_depth)
    said = _said([one for place, one in same_field if place == furthest])
    name = _written(furthest)
    return bad_request(f"{name or 'the body'}: {said}", name)


def _written(place: tuple[int | str, ...]) -> str | None:
    return ".".join(map(str, place)) or None


def _depth(place: tuple[int | str, ...]) -> tuple[int, list[int]]:
    return len(place), [step if isinstance(step, int) else -1 for step in place]


def _place(one: ErrorDetails, value: Any) -> tuple[int | str, ...]:
    """Return the steps of an error's place that lead through the value."""
    if value is None:
        return one["loc"]
    place: list[int | str] = []
    for number, step in enumerate(one["loc"]):
        inside = isinstance(value, dict) if isinstance(step, str) else isinstance(value, list)
        if inside and (step in value if isinstance(step, str) else step < len(value)):
            value = value[step]
            place.append(step)
        elif one["type"] == "missing" and number == len(one["loc"]) - 1:
            place.append(step)
    return tuple(place)


def _said(found: Sequence[ErrorDetails]) -> str:
    """Return what the alternatives of one place want."""
    # Where a value has the type of one branch, that of the others says nothing.
    telling = [one for one in found if not one["type"].endswith("_type")] or found
    messages = dict.fromkeys(one["msg"].partition(" or instance of ")[0] for one in telling)
    first, *others = messages
    return " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
