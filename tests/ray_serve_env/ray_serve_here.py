"""A Ray Serve application of two models, on this machine's loopback alone, for the tests beside this file."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import runtime_models
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray_serve.app import Model, build

ROOT = Path(__file__).parents[2]
CONTEXT, LAYERS = 4096, 8  # of the tiny models here: an answer takes long enough to leave it
WAITING = 12  # requests for the second of the two
TWO, GROWING = "org/two", "growing"  # models with two replicas, and with one that becomes two


@dataclass(frozen=True)
class Application:
    """A running application.

    Args:
        url: Where it listens.
        address: Where Ray does.
        bundles: The folder of each model.
    """

    url: str
    address: str
    bundles: dict[str, Path]


def replicas(model: str) -> list[int]:
    """Return the processes of a model's live replicas."""
    name = f"ServeReplica:default:model-{model.replace('/', '-')}"
    actors: dict[str, Any] = ray._private.state.actors()
    alive = (actor for actor in actors.values() if actor["State"] == "ALIVE")
    return [int(actor["Pid"]) for actor in alive if actor["ActorClassName"] == name]


def wait_until(holds: Callable[[], bool], *, seconds: float = 90) -> float:
    """Wait until something holds, and return the seconds that it took."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < seconds, "it never came"
        time.sleep(0.02)
    return time.monotonic() - begin


def written(folder: Path) -> dict[str, Path]:
    """Write two models with other weights, and return their folders."""
    runtime_models.LAYERS = LAYERS
    return {
        name: endless(
            runtime_models.TinyDecoder(seed=seed, context=CONTEXT).write(folder / str(seed), eos=[])
        )
        for seed, name in enumerate((TWO, GROWING))
    }


def endless(bundle: Path) -> Path:
    """Let no token end an answer."""
    (bundle / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))
    return bundle


@contextmanager
def started(bundles: dict[str, Path]) -> Iterator[Application]:
    """Start Ray, Serve and the sample, and end all of them."""
    home = tempfile.mkdtemp(prefix="rk")  # short: the paths of Ray's sockets may have 107 characters
    os.environ["HOME"] = home  # Ray writes a token there
    port = free_port()
    # Each replica declares a CPU, whether the machine has as many or not.
    ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=home)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        two = AutoscalingConfig(min_replicas=2, max_replicas=2)
        growing = AutoscalingConfig(
            min_replicas=1,
            max_replicas=2,
            target_ongoing_requests=3,
            upscale_delay_s=1,
            metrics_interval_s=1,
            look_back_period_s=2,
        )
        models = {
            TWO: Model(str(bundles[TWO]), two),
            GROWING: Model(str(bundles[GROWING]), growing, waiting=WAITING),
        }
        serve.run(build(models))
        address = ray.get_runtime_context().gcs_address
        yield Application(f"http://127.0.0.1:{port}", address, bundles)
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
