"""The class that Triton drives, with a double of the module that exists inside the server only."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from runtime_models import TinyDecoder

from rk_export.errors import InputError
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.triton.model import TritonModel

WITHIN = 30  # seconds for one response
FINAL = 1


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class Request:
    """A request, and the sender of its responses."""

    def __init__(self, parameters: str = "", **values: Any) -> None:
        self._parameters = parameters
        self.tensors = {name: Tensor(name, np.array([value])) for name, value in values.items()}
        self.tensors |= {
            name: Tensor(name, np.array([value.encode()], object))
            for name, value in values.items()
            if isinstance(value, str)
        }
        self.responses: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: Any, flags: int = 0) -> None:
        self.responses.put((response, flags))

    def is_cancelled(self) -> bool:
        return False

    def all(self) -> list[Any]:
        """Return the responses up to the last one."""
        found = []
        while not found or found[-1][1] != FINAL:
            found.append(self.responses.get(timeout=WITHIN))
        assert self.responses.empty()
        return [response for response, _ in found]


class TritonError:
    INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED = range(4)

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


class Model(TritonModel):
    utils: ClassVar[Any] = SimpleNamespace(
        Tensor=Tensor,
        TritonError=TritonError,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        InferenceResponse=lambda output_tensors, error=None: SimpleNamespace(
            error=error, **{tensor.name: tensor.array.tolist() for tensor in output_tensors}
        ),
        get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
    )


def opened(folder: Path, **parameters: str) -> Model:
    """Open the bundle ``bundle`` in a folder that passes for a version of a model."""
    model = Model()
    entries = {name: {"string_value": value} for name, value in {"provider": "cpu", **parameters}.items()}
    config = json.dumps({"parameters": entries})
    model.initialize(
        {"model_repository": str(folder.parent), "model_version": folder.name, "model_config": config}
    )
    return model


def test_requests_are_answered_as_by_the_session(tmp_path: Path) -> None:
    session = Session.from_pretrained(
        TinyDecoder().write(tmp_path / "1" / "bundle"), provider="cpu", threads=1
    )
    expected = session.generate("hello", options=GenerationOptions(max_new_tokens=8))[0]
    model = opened(tmp_path / "1", slots="2")
    requests = [
        Request(text_input="hello", max_tokens=8, stream=True),
        Request(text_input="hello", max_tokens=8),
        Request('{"best_of": 2}', text_input="hello"),
    ]
    model.execute(requests)
    streamed, whole, refused = (request.all() for request in requests)
    model.finalize()
    assert len(streamed) > 1
    assert "".join(one.text_output[0].decode() for one in streamed) == expected.text
    assert [one.text_output for one in whole] == [[expected.text.encode()]]
    for last in (streamed[-1], whole[-1]):
        assert last.finish_reason == [expected.finish_reason.encode()]
        assert (last.prompt_tokens, last.completion_tokens) == ([expected.prompt_tokens], [8])
    (error,) = (one.error for one in refused)
    assert error.code == TritonError.INVALID_ARG
    assert error.message.startswith("best_of: there is no such field")


def test_a_model_that_is_misconfigured_does_not_load(tmp_path: Path) -> None:
    TinyDecoder().write(tmp_path / "1" / "bundle")
    with pytest.raises(InputError, match="slotz: there is no such parameter"):
        opened(tmp_path / "1", slotz="2")
