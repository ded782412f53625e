"""Speaks to a served bundle: Triton's generate extension over HTTP, and its stream over gRPC."""

from __future__ import annotations

import json
import queue
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton_server import TritonServer
from tritonclient import grpc

WITHIN = 60  # seconds for one answer
_TYPES: dict[str, tuple[str, Any]] = {
    "max_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "seed": ("INT64", np.int64),
    "stream": ("BOOL", np.bool_),
}

Answer = dict[str, Any]


class Served:
    """One model of a running server.

    Args:
        server: The server.
        name: Name of the model.
    """

    def __init__(self, server: TritonServer, name: str) -> None:
        self._server, self._name = server, name

    def generate(self, **body: Any) -> tuple[int, Answer]:
        """Return status and body of one answer."""
        status, text = self._post("generate", body)
        return status, json.loads(text)

    def stream(self, **body: Any) -> list[Answer]:
        """Return the events of a streamed answer."""
        _, text = self._post("generate_stream", {**body, "stream": True})
        return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]

    def grpc(self, **values: Any) -> list[Answer]:
        """Return the responses to one request over gRPC, the empty last one left out."""
        with self.grpc_stream(**values) as responses:
            return list(responses)

    @contextmanager
    def grpc_stream(self, **values: Any) -> Iterator[Iterator[Answer]]:
        """Give the responses to one request while they come; leaving before the last one cancels it."""
        client, found = grpc.InferenceServerClient(f"127.0.0.1:{self._server.grpc}"), queue.Queue[Any]()
        client.start_stream(lambda result, error: found.put(error or result))
        inputs = [_input(name, value) for name, value in values.items()]
        client.async_stream_infer(self._name, inputs, enable_empty_final_response=True)
        ended = threading.Event()
        try:
            yield _responses(found, ended)
        finally:
            # tritonserver 2.51 never unloads a model if a stream was cancelled at the moment when it ended.
            client.stop_stream(cancel_requests=not ended.is_set())
            client.close()

    @contextmanager
    def http_connection(self, kind: str, **body: Any) -> Iterator[socket.socket]:
        """Send a request and give the connection, which is closed whatever has come."""
        data = json.dumps(body).encode()
        head = (
            f"POST /v2/models/{self._name}/{kind} HTTP/1.1\r\nHost: me\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self._server.http), timeout=WITHIN) as connection:
            connection.sendall(head.encode() + data)
            yield connection

    def _post(self, kind: str, body: Any) -> tuple[int, str]:
        url = f"{self._server.url}/v2/models/{self._name}/{kind}"
        request = urllib.request.Request(url, json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=WITHIN) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def _input(name: str, value: Any) -> Any:
    kind, dtype = _TYPES.get(name, ("BYTES", np.object_))
    items = [item.encode() if isinstance(item, str) else item for item in np.atleast_1d(value).tolist()]
    tensor = grpc.InferInput(name, [len(items)], kind)
    tensor.set_data_from_numpy(np.array(items, dtype))
    return tensor


def _responses(found: queue.Queue[Any], ended: threading.Event) -> Iterator[Answer]:
    while not ended.is_set():
        result = found.get(timeout=WITHIN)
        if isinstance(result, Exception):
            ended.set()
            raise result
        response = result.get_response()
        if response.parameters["triton_final_response"].bool_param:
            ended.set()
        if response.outputs:
            yield {output.name: _plain(result.as_numpy(output.name)) for output in response.outputs}


def _plain(array: np.ndarray) -> Any:
    (value,) = array.tolist()
    return value.decode() if isinstance(value, bytes) else value
