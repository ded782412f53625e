"""Starts the tritonserver that the package nvidia-pytriton brings, on free ports of this machine, and ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytriton
from libpython import library_folder

READY_WITHIN = 120  # seconds
ENDED_WITHIN = 60


class TritonServer:
    """A running server.

    Args:
        repository: The model repository.
        folder: An empty folder for its backends and its log.
    """

    def __init__(self, repository: Path, folder: Path) -> None:
        home = Path(pytriton.__file__).parent / "tritonserver"
        self.http, self.grpc = _free_port(), _free_port()
        self.log = folder / "log.txt"
        command = [
            str(home / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={_backends(home, folder)}",
            *("--http-address=127.0.0.1", f"--http-port={self.http}"),
            *("--grpc-address=127.0.0.1", f"--grpc-port={self.grpc}"),
            *("--allow-metrics=false", "--exit-on-error=true", "--exit-timeout-secs=50"),
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=_environment(home), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def url(self) -> str:
        """Where HTTP is answered."""
        return f"http://127.0.0.1:{self.http}"

    def wait(self) -> None:
        """Return when the models are loaded.

        Raises:
            RuntimeError: The server ended, or was not ready in time; with its log.
        """
        end = time.monotonic() + READY_WITHIN
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        code = self._process.poll()
        self.kill()
        state = "was not ready in time" if code is None else f"ended with {code}"
        raise RuntimeError(f"tritonserver {state}:\n{self.log.read_text(errors='replace')}")

    def stop(self) -> int:
        """Ask the server to end, and return its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=ENDED_WITHIN)

    def kill(self) -> None:
        """End the server and its stubs, whatever they do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # stubs outlive a server that gave up on them
        self._process.wait()

    def members(self) -> list[int]:
        """Return the processes of the server that are still there, its stubs included."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        try:
            return os.getpgid(pid) == self._process.pid
        except ProcessLookupError:
            return False


def _backends(home: Path, folder: Path) -> Path:
    """Return a folder with the Python backend and the stub of this Python, which the server looks for beside it."""
    stub = home / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(home / "backends", folder / "backends")
    shutil.copy(stub / "triton_python_backend_stub", folder / "backends" / "python")
    return folder / "backends"


def _environment(home: Path) -> dict[str, str]:
    libraries = [folder for folder in (home.parents[1] / "nvidia_pytriton.libs", library_folder()) if folder]
    # The stub takes the packages of the first python3 that it finds.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
