"""Try a library in a process of its own: a crash of native code, or its noise on the terminal, stays there.

ONNX Runtime writes to the file descriptor itself when an execution provider fails to load, and then falls
back to the CPU without an exception; both are turned into a :class:`Trial` here.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rk_export.errors import ProviderError, RkExportError

ProbeName = Literal["cpu", "cuda", "torch", "export"]

_SECONDS = 180  # a cold import of PyTorch from a network drive takes a minute
_LIBRARY_ERROR = re.compile(r"with error: (.+)")
_ANSWER = "rk-export probe: "  # marks our line: libraries print to standard output too
_START = "import sys; from rk_export.commands.environment_probes import main; main(sys.argv[1])"


@dataclass(frozen=True)
class Trial:
    """What became of a probe.

    Args:
        facts: What the library told about itself; may be there for a failure too.
        failure: Why it does not work; empty where it does.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def try_out(probe: ProbeName) -> Trial:
    """Run a probe in a new interpreter with this one's import path; never raises for what goes wrong there.

    Args:
        probe: ``cpu`` and ``cuda`` run a ``MatMulNBits`` node on that execution provider, ``torch`` looks for
            a CUDA device, ``export`` imports all that an export needs.
    """
    command = [sys.executable, "-c", _START, probe]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Trial(failure=f"no answer within {_SECONDS} seconds")
    return _trial(done.returncode, done.stdout.splitlines(), done.stderr.splitlines())


def _trial(status: int, output: list[str], noise: list[str]) -> Trial:
    last_words = next((line.strip() for line in reversed(noise) if line.strip()), "no message")
    answers = [line.removeprefix(_ANSWER) for line in output if line.startswith(_ANSWER)]
    if status != 0 or not answers:
        how = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return Trial(failure=f"{how}: {last_words}")
    answer = json.loads(answers[-1])
    failure = answer["failure"]
    if failure and (cause := _LIBRARY_ERROR.search("\n".join(noise))):
        failure += f" ({cause.group(1).strip()})"
    return Trial(answer["facts"], failure)


def main(probe: str) -> None:
    """Run one probe in this process and write its answer as a line of standard output."""
    facts: dict[str, Any] = {}
    failure = ""
    try:
        _PROBES[probe](facts)
    except RkExportError as error:
        failure = error.what
    except Exception as error:  # whatever a broken installation raises is the answer
        failure = f"{type(error).__name__}: {error}"
    answer = json.dumps({"facts": facts, "failure": " ".join(failure.split())})
    sys.stdout.write(f"\n{_ANSWER}{answer}\n")


def _probe_cpu(facts: dict[str, Any]) -> None:
    _run_session("cpu", facts)


def _probe_cuda(facts: dict[str, Any]) -> None:
    _run_session("cuda", facts)


def _run_session(provider: Literal["cpu", "cuda"], facts: dict[str, Any]) -> None:
    """Run one ``MatMulNBits`` node, the operator that every quantized matrix becomes."""
    import numpy as np
    import onnxruntime as ort

    facts.update(version=ort.__version__, build=_build_name(), listed=ort.get_available_providers())
    from rk_export.runtime.providers import SessionSettings, open_session

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "probe.onnx"
        model.write_bytes(_matmul_nbits())
        session = open_session(model, SessionSettings(provider=provider))
        facts["providers"] = session.get_providers()
        (result,) = session.run(None, {"A": np.ones((1, 32), np.float32)})
    if not np.array_equal(result, [[-128.0]]):
        raise RuntimeError(f"MatMulNBits gave {result.tolist()} instead of [[-128.0]]")


def _build_name() -> str:
    """Return the distribution that the files on disk were built as; metadata may tell of another."""
    information = importlib.import_module("onnxruntime.capi.build_and_package_info")
    return str(information.package_name)


def _matmul_nbits() -> bytes:
    """Return a graph that multiplies A (1, 32) by 32 4-bit weights of value 4 - 8, all scales 1."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    packed = numpy_helper.from_array(np.full((1, 1, 16), 0x44, np.uint8), "B")
    scales = numpy_helper.from_array(np.ones((1, 1), np.float32), "scales")
    node = helper.make_node(
        "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft", K=32, N=1, bits=4, block_size=32
    )
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [1, 32])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, 1])],
        [packed, scales],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def _probe_torch(facts: dict[str, Any]) -> None:
    import torch

    facts["cuda"] = torch.version.cuda
    if torch.version.cuda is None:
        raise ProviderError("this build of PyTorch has no CUDA")
    with warnings.catch_warnings(record=True) as caught:  # PyTorch tells of an old driver in a warning only
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        raise ProviderError("; ".join(["no CUDA device found", *(str(item.message) for item in caught)]))
    facts["device"] = torch.cuda.get_device_name(0)
    torch.ones(1, device="cuda").add_(1).cpu()  # a device without kernels in this build shows here


def _probe_export(facts: dict[str, Any]) -> None:
    importlib.import_module("rk_export.commands.compress")


_PROBES: dict[str, Callable[[dict[str, Any]], None]] = {
    "cpu": _probe_cpu,
    "cuda": _probe_cuda,
    "torch": _probe_torch,
    "export": _probe_export,
}
