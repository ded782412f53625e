"""The image's very steps, without a container engine: its environment is made, and its server answers and ends.

The steps fetch packages, so `make test-container` runs them, not the gate.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "RK_TEST_CONTAINER" not in os.environ:
    pytest.skip("fetches packages: run `make test-container`", allow_module_level=True)

from image_steps import Stage, build
from runtime_models import TinyDecoder

from rk_export.bundle.targets.pods import QUEUE_METRIC

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "samples" / "container" / "Containerfile"
MOST_MEGABYTES = 400  # of the environment for the CPU; PyTorch alone is more


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Build the image below a folder."""
    root = tmp_path_factory.mktemp("image")
    bin_folder = root / "usr" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    stage = build(CONTAINERFILE, ROOT, root, {**kept, "PATH": path}, RUNTIME="cpu")
    TinyDecoder().write(root / "bundle")
    return stage


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(
    image: Stage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start what the image starts, with its environment alone, on a free port of this machine only."""
    port, home = free_port(), tmp_path_factory.mktemp("tmp")
    command = [*image.settings["ENTRYPOINT"], *image.settings["CMD"], "--host=127.0.0.1", f"--port={port}"]
    variables = {**image.variables, "HOME": str(home), "TMPDIR": str(home), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, env=variables, cwd=home) as process:
        try:
            wait_for(process, f"http://127.0.0.1:{port}/health/ready")
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not become ready")


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
    return json.loads(text) if "json" in response.headers["Content-Type"] else text


def test_the_environment_has_no_exporter_in_it_and_is_small(image: Stage) -> None:
    place = image.root / "opt" / "rk-export"
    packages = next(place.glob("lib/*/site-packages"))
    assert not [name for name in ("torch", "transformers", "pip") if (packages / name).exists()]
    assert (packages / "rk_export" / "runtime" / "session.py").is_file()
    size = sum(path.stat().st_size for path in files_of(place) if not path.is_symlink()) / 1e6
    print(f"environment: {size:.0f} MB")
    assert size < MOST_MEGABYTES


def test_the_server_answers_and_writes_nothing_into_the_image(
    image: Stage, server: tuple[subprocess.Popen[bytes], str]
) -> None:
    before = files_of(image.root)
    url = server[1]
    assert [model["id"] for model in ask(f"{url}/v1/models")["data"]] == ["bundle"]
    body = {"model": "bundle", "prompt": "The harbour", "max_tokens": 4, "temperature": 0}
    answer = ask(f"{url}/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 4
    assert ask(f"{url}/v2/models/bundle")["name"] == "bundle"
    assert f'{QUEUE_METRIC}{{model="bundle"}} 0.0' in ask(f"{url}/metrics").splitlines()
    assert files_of(image.root) == before


def test_the_health_check_tells_a_server_from_none(
    image: Stage, server: tuple[subprocess.Popen[bytes], str]
) -> None:
    port = server[1].rpartition(":")[2]
    check = [part.replace(":8000/", f":{port}/") for part in image.settings["HEALTHCHECK"]]
    assert subprocess.run(check, timeout=30, check=False).returncode == 0
    closed = [part.replace(":8000/", f":{free_port()}/") for part in image.settings["HEALTHCHECK"]]
    assert subprocess.run(closed, timeout=30, check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_it_ends_when_the_cluster_asks(server: tuple[subprocess.Popen[bytes], str]) -> None:
    """The last test of the server: it is gone afterwards."""
    process = server[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
