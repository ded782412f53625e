"""Bodies of requests: JSON within bounds, as a model of pydantic."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from rk_export.errors import InputError
from rk_export.json_codec import parse_json
from rk_export.runtime.server.errors import ApiError, bad_request

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    """Base of what clients send: no unknown fields, and a number is no string."""

    model_config = ConfigDict(extra="forbid", strict=True)


async def read(request: Request, kind: type[T]) -> T:
    """Return the body of a request.

    Raises:
        ApiError: It is no JSON, lies about its type, or has fields that are unknown or of a wrong type.
    """
    given = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if given != "application/json":
        raise ApiError(415, f"the body is {given!r}; send application/json", code="unsupported_media_type")
    return parse(await request.body(), kind)


def parse(body: bytes, kind: type[T]) -> T:
    """Return the model of a body.

    Raises:
        ApiError: As `read`.
    """
    value = parse_object(body)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise misfit(error) from error
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


def misfit(error: ValidationError) -> ApiError:
    """Return what the first misfit of a body is, with its place."""
    found = error.errors(include_url=False, include_input=False)
    # A union reports every alternative; an unknown field explains more than what is missing.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(step) for step in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"{place} is not known or not supported", place, "unknown_parameter")
    return bad_request(f"{place or 'the body'}: {first['msg']}", place)
