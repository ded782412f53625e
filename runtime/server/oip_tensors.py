"""Tensors of the Open Inference Protocol: in JSON, or as bytes behind it (the binary tensor extension)."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from rk_export.runtime.server.errors import ApiError, bad_request, json_bytes
from rk_export.runtime.server.reading import Strict, parse

HEADER = "Inference-Header-Content-Length"
_LENGTH = struct.Struct("<I")
_KINDS: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}
_SIZE = re.compile(r"[0-9]{1,18}")
_MOST_DIMS = 8


class InputTensor(Strict):
    """One input as a client describes it."""

    name: str
    shape: list[int] = Field(max_length=_MOST_DIMS)
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class OutputTensor(Strict):
    """One output that a client wants."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(Strict):
    """Body of ``POST /v2/models/MODEL/infer``."""

    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InputTensor] = Field(min_length=1, max_length=16)
    outputs: list[OutputTensor] | None = None


@dataclass(frozen=True)
class Inference:
    """A parsed request.

    Args:
        asked: Its JSON.
        texts: Inputs of datatype BYTES by name.
        integers: Inputs of whole numbers by name, int64.
    """

    asked: InferRequest
    texts: dict[str, list[str]]
    integers: dict[str, np.ndarray]


def read_inference(body: bytes, header: str | None) -> Inference:
    """Return the request in a body.

    Args:
        body: JSON, and the tensors behind it.
        header: Length of the JSON in bytes, as the header of that name gives it; None where all is JSON.

    Raises:
        ApiError: The body is malformed.
    """
    size = len(body)
    if header is not None:
        # Python reads no number of thousands of digits.
        if not _SIZE.fullmatch(header) or int(header) > size:
            raise bad_request(f"{HEADER} is {header[:20]!r}, the body has {size} bytes", HEADER)
        size = int(header)
    asked = parse(body[:size], InferRequest)
    rest, texts, integers = body[size:], {}, {}
    for tensor in asked.inputs:
        raw, rest = _taken(tensor, rest)
        if tensor.datatype == "BYTES":
            texts[tensor.name] = _texts(tensor, raw)
        elif tensor.datatype in _KINDS:
            integers[tensor.name] = _integers(tensor, raw)
        else:
            raise bad_request(f"datatype {tensor.datatype!r} is none of BYTES, INT64 and INT32", tensor.name)
    if rest:
        raise bad_request(f"{len(rest)} bytes behind the last tensor", HEADER)
    return Inference(asked, texts, integers)


def check_outputs(asked: InferRequest, name: str) -> None:
    """Refuse outputs that the inputs do not give, before anything is computed.

    Raises:
        ApiError: One has another name, or the only one is wanted twice.
    """
    for output in asked.outputs or ():
        if output.name != name:
            raise bad_request(f"no output is named {output.name!r}; there is: {name}", "outputs")
    if asked.outputs and len(asked.outputs) > 1:
        raise bad_request(f"{name} is wanted {len(asked.outputs)} times", "outputs")


def wants_bytes(asked: InferRequest) -> bool:
    """Return whether the output is wanted as bytes behind the JSON."""
    given = asked.outputs[0].parameters if asked.outputs else {}
    return given.get("binary_data", asked.parameters.get("binary_data_output", False)) is True


def write_inference(
    asked: InferRequest, model: str, name: str, value: np.ndarray | list[str]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a response and its headers.

    Args:
        asked: The request.
        model: Who answers.
        name: Of the output.
        value: The output: float32, or texts.

    Raises:
        ApiError: A number is infinite, which JSON does not have.
    """
    binary = wants_bytes(asked)
    entry, raw = _entry(name, value, binary=binary)
    head = {"model_name": model, "model_version": "1", "outputs": [entry]}
    text = json_bytes(head if asked.id is None else {"id": asked.id, **head})
    if not binary:
        return text, {"Content-Type": "application/json"}
    headers = {HEADER: str(len(text)), "Content-Type": "application/octet-stream"}
    return text + raw, headers


def _taken(tensor: InputTensor, rest: bytes) -> tuple[bytes | None, bytes]:
    """Return the bytes of a tensor, None where its data are in the JSON, and those behind them."""
    size = tensor.parameters.get("binary_data_size")
    if (size is None) == (tensor.data is None):
        raise bad_request("give either data or binary_data_size", tensor.name)
    if size is None:
        return None, rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise bad_request(f"binary_data_size is {size!r}, {len(rest)} bytes are left", tensor.name)
    return rest[:size], rest[size:]


def _count(tensor: InputTensor) -> int:
    if any(size < 0 or size >= 1 << 31 for size in tensor.shape):
        raise bad_request(f"shape {tensor.shape} is out of range", tensor.name)
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _texts(tensor: InputTensor, raw: bytes | None) -> list[str]:
    items: Sequence[Any] = list(_flat(tensor.data or [])) if raw is None else _split(tensor.name, raw)
    if len(items) != _count(tensor) or not all(isinstance(item, str) for item in items):
        raise bad_request(f"shape {tensor.shape} and its data, which must be texts, do not fit", tensor.name)
    return list(items)


def _split(name: str, raw: bytes) -> list[str]:
    """Return texts that stand one behind the other, each behind its length."""
    found, place = [], 0
    while place < len(raw):
        if place + _LENGTH.size > len(raw):
            raise bad_request("a length is cut off", name)
        (size,) = _LENGTH.unpack_from(raw, place)
        place += _LENGTH.size
        if place + size > len(raw):
            raise bad_request("a text is cut off", name)
        try:
            found.append(raw[place : place + size].decode())
        except UnicodeDecodeError as error:
            raise bad_request("a text is not UTF-8", name) from error
        place += size
    return found


def _integers(tensor: InputTensor, raw: bytes | None) -> np.ndarray:
    count, kind = _count(tensor), _KINDS[tensor.datatype]
    if raw is not None:
        if len(raw) != count * kind.itemsize:
            raise bad_request(f"shape {tensor.shape} and {len(raw)} bytes do not fit", tensor.name)
        return np.frombuffer(raw, kind).astype(np.int64).reshape(tensor.shape)
    items = list(_flat(tensor.data or []))
    if len(items) != count or not all(type(item) is int and abs(item) < 1 << 62 for item in items):
        raise bad_request(
            f"shape {tensor.shape} and its data, which must be whole numbers, do not fit", tensor.name
        )
    return np.array(items, np.int64).reshape(tensor.shape)


def _flat(value: list[Any]) -> list[Any]:
    """Return the elements of an array that may be nested; bodies are not deeper than JSON may be."""
    found: list[Any] = []
    for item in value:
        if isinstance(item, list):
            found += _flat(item)
        else:
            found.append(item)
    return found


def _entry(name: str, value: np.ndarray | list[str], *, binary: bool) -> tuple[dict[str, Any], bytes]:
    if isinstance(value, list):
        entry: dict[str, Any] = {"name": name, "shape": [len(value)], "datatype": "BYTES"}
        parts = [text.encode("utf-8", "replace") for text in value]
        raw = b"".join(_LENGTH.pack(len(part)) + part for part in parts)
    else:
        entry = {"name": name, "shape": list(value.shape), "datatype": "FP32"}
        raw = value.astype("<f4", copy=False).tobytes() if binary else b""
    if binary:
        return {**entry, "parameters": {"binary_data_size": len(raw)}}, raw
    if not isinstance(value, list) and not np.isfinite(value).all():
        raise ApiError(400, "JSON has no infinite numbers; ask for binary data", code="not_finite")
    return {**entry, "data": value if isinstance(value, list) else value.ravel().tolist()}, b""
