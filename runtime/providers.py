"""Opens ONNX Runtime sessions on the execution provider that was asked for, or says why not."""

from __future__ import annotations

import ctypes
import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from rk_export.errors import InputError, ProviderError
from rk_export.runtime.float_experts import float_experts
from rk_export.runtime.graph_proto import check_graph, graph_bytes

Provider = Literal["auto", "cpu", "cuda"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_ERRORS_ONLY = 3  # ONNX Runtime warns about every initializer that may be overridden

logger = logging.getLogger(__name__)

_UNREADABLE = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True)
class SessionSettings:
    """How to open a graph.

    Args:
        provider: ``auto`` takes CUDA where it works and the CPU elsewhere; ``cuda`` insists.
        threads: Threads within one operator; None lets ONNX Runtime decide.
        accuracy_level: Overrides the attribute of every ``MatMulNBits`` and ``QMoE``: 0 computes in the type of the
            activations, 4 quantizes them to int8. At 0 products made for int8 inputs read floats too. None keeps
            what the graph says.
        spinning: Threads that wait for work keep their core busy; else they sleep, which is slower on free cores.

    Raises:
        InputError: A setting is out of its range.
    """

    provider: Provider = "auto"
    threads: int | None = None
    accuracy_level: int | None = None
    spinning: bool = True

    def __post_init__(self) -> None:
        if self.provider not in ("auto", "cpu", "cuda"):
            raise InputError(f"{self.provider!r} is unknown", where="provider", fix="give auto, cpu or cuda")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"{self.threads} is out of range", where="threads", fix="give at least 1")
        if self.accuracy_level not in (None, 0, 4):
            raise InputError(f"{self.accuracy_level} is unknown", where="accuracy_level", fix="give 0 or 4")


def open_session(model: Path, settings: SessionSettings) -> Any:
    """Open a graph.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        ProviderError: CUDA was asked for and does not work here.
        InputError: The graph or its external data cannot be loaded, or the graph reads files outside its folder.
    """
    check_graph(model)
    if settings.provider == "cpu":
        return _create(model, settings, [CPU])
    obstacle = cuda_obstacle()
    if obstacle is None:
        session = _create(model, settings, [CUDA, CPU])
        if CUDA in session.get_providers():
            return session
        # ONNX Runtime falls back without an exception; only the session tells.
        obstacle = "ONNX Runtime could not load its CUDA libraries"
    if settings.provider == "cuda":
        raise ProviderError(
            f"the CUDA execution provider cannot be used: {obstacle}",
            where="provider",
            fix="run `rk-export doctor`, or give provider='cpu'",
        )
    logger.warning("running on the CPU execution provider: %s", obstacle)
    return _create(model, settings, [CPU])


def device_of(session: Any) -> str:
    """Return ``cuda`` or ``cpu``: the device on which a session keeps its cache."""
    return "cuda" if CUDA in session.get_providers() else "cpu"


def cuda_obstacle() -> str | None:
    if CUDA not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA execution provider"
    # Looking for the driver first spares the user the error that ONNX Runtime prints on machines without one.
    driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(driver)
    except OSError:
        return "no CUDA driver found"
    ort.preload_dlls()
    return None


def _create(model: Path, settings: SessionSettings, providers: list[str]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if not settings.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source: str | bytes = str(model)
    if settings.accuracy_level is not None or any(path.is_symlink() for path in model.parent.rglob("*")):
        source, folder = graph_bytes(model, settings.accuracy_level)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        with float_experts() if settings.accuracy_level == 0 else nullcontext():
            return ort.InferenceSession(source, options, providers=providers)
    except _UNREADABLE as error:
        raise InputError(
            f"ONNX Runtime cannot load the graph: {str(error).splitlines()[0]}",
            where=str(model),
            fix="check that every file of the bundle is there and whole, or export it again",
        ) from error
