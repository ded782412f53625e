"""The class that Triton's Python backend drives; a bundle's model.py gives it the backend's own module."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rk_export.runtime.engine.records import Answer
from rk_export.runtime.triton.desk import Desk
from rk_export.runtime.triton.refusal import Refusal
from rk_export.runtime.triton.settings import ServedSettings
from rk_export.runtime.triton.tensors import BUNDLE_FOLDER, INPUTS


class TritonModel:
    """A served bundle. Requests are answered together by one engine, so one instance is enough.

    ``utils`` is the module ``triton_python_backend_utils``, which exists inside the server only.
    """

    utils: ClassVar[Any]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle that lies beside model.py.

        Args:
            args: ``model_repository`` (the model's folder), ``model_version`` and ``model_config`` (JSON).

        Raises:
            InputError: The bundle or a parameter of the configuration cannot be used.
            ProviderError: CUDA was asked for and cannot run this bundle here.
        """
        from rk_export.runtime.engine import Engine
        from rk_export.runtime.session import Session

        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE_FOLDER
        settings = ServedSettings.read(json.loads(args["model_config"]).get("parameters", {}))
        session = Session.from_pretrained(
            folder,
            provider=settings.session.provider,
            threads=settings.session.threads,
            max_length=settings.max_length,
        )
        self._desk = Desk(Engine(session, settings.engine))

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin requests; their responses follow through a sender of their own, as decoupled models do."""
        for request in requests:
            found = {
                tensor.name: self.utils.get_input_tensor_by_name(request, tensor.name) for tensor in INPUTS
            }
            tensors = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
            parameters = json.loads(request.parameters() or "{}")
            self._desk.take(tensors, parameters, ResponseWire(self.utils, request.get_response_sender()))

    def finalize(self) -> None:
        """Close the engine."""
        self._desk.close()


class ResponseWire:
    """Sends pieces and answers as responses of Triton.

    Args:
        utils: The module ``triton_python_backend_utils``.
        sender: The response sender of one request.
    """

    def __init__(self, utils: Any, sender: Any) -> None:
        self._utils, self._sender = utils, sender

    def piece(self, text: str) -> None:
        """Send a part of the answer."""
        self._sender.send(self._utils.InferenceResponse(output_tensors=[self._text("text_output", text)]))

    def answer(self, text: str, answer: Answer) -> None:
        """Send the last part of the answer and how it ended."""
        tensors = [
            self._text("text_output", text),
            self._text("finish_reason", answer.finish_reason.value),
            self._count("prompt_tokens", answer.prompt_tokens),
            self._count("completion_tokens", len(answer.token_ids)),
        ]
        self._last(self._utils.InferenceResponse(output_tensors=tensors))

    def refuse(self, refusal: Refusal) -> None:
        """End without an answer."""
        kinds = self._utils.TritonError
        error = kinds(refusal.message, getattr(kinds, refusal.kind))
        self._last(self._utils.InferenceResponse(output_tensors=[], error=error))

    def cancelled(self) -> bool:
        """Whether the client left."""
        return bool(self._sender.is_cancelled())

    def _last(self, response: Any) -> None:
        self._sender.send(response, flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _text(self, name: str, text: str) -> Any:
        return self._utils.Tensor(name, np.array([text.encode()], dtype=object))

    def _count(self, name: str, count: int) -> Any:
        return self._utils.Tensor(name, np.array([count], np.int32))
