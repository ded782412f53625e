"""Layers that a Ray cluster of two nodes finishes are those of one process, though a worker is killed.

Runs in an environment of its own (``make test-ray``): Ray is large.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs Ray: run `make test-ray`")

import torch
from ray.cluster_utils import Cluster
from transformers import LlamaConfig, LlamaForCausalLM

from rk_export.calibration.layer_statistics import NoStatistics
from rk_export.errors import InputError
from rk_export.planning.planner import decide_plan
from rk_export.recipes import load
from rk_export.rewrite.layer_store import LayerStore
from rk_export.rewrite.layer_work import LayerWork
from rk_export.rewrite.ray_cluster import finish_on_cluster
from rk_export.source.stored import open_source

LAYERS = 6


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes on this machine, one process each."""
    # Its processes import what this one does.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    # Ray writes a token there; short, for the paths of its sockets may have 107 characters.
    home = tempfile.mkdtemp(prefix="rk")
    os.environ["HOME"] = home
    cluster = started(home)
    yield cluster.address
    cluster.shutdown()
    shutil.rmtree(home, ignore_errors=True)


def started(folder: str) -> Cluster:
    """Start the nodes. Ray gives one 30 seconds, too few for the first one on a busy machine."""
    for attempt in range(3):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=1, include_dashboard=False, temp_dir=folder)
            cluster.add_node(num_cpus=1)
            return cluster
        except Exception:  # Ray raises it bare
            cluster.shutdown()
            if attempt == 2:
                raise
    raise AssertionError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Slow(NoStatistics):
    """Leaves time to kill the process that asks, which it notes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of_sites(self, layer: Any, sites: Any) -> Any:
        (self.folder / f"{layer.index}-{os.getpid()}").touch()
        time.sleep(2)
        return {}


class Refusing(NoStatistics):
    """Refuses every layer."""

    def of_sites(self, *given: Any) -> Any:
        raise InputError("is not to be had", where="statistics", fix="ask for others")


def work_on(model: Path, folder: Path, statistics: NoStatistics) -> LayerWork:
    folder.mkdir(exist_ok=True)
    source = open_source(model)
    plan = decide_plan(source, load("int4"))
    return LayerWork(source, plan, statistics, {}, LayerStore(folder / "layers"), torch.device("cpu"))


def test_a_killed_workers_layer_is_made_again_and_all_are_the_same(
    address: str, model: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    asked.mkdir()
    work = work_on(model, tmp_path / "cluster", Slow(asked))
    killed: list[str] = []

    def kill_one() -> None:
        while not (found := list(asked.iterdir())):
            time.sleep(0.05)
        killed.append(found[0].name)
        os.kill(int(found[0].name.partition("-")[2]), signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    finish_on_cluster(work, tmp_path / "cluster", address)
    thread.join()
    index = killed[0].partition("-")[0]
    assert len([path for path in asked.iterdir() if path.name.startswith(f"{index}-")]) == 2
    assert len({path.name.partition("-")[2] for path in asked.iterdir()}) > 1
    alone = work_on(model, tmp_path / "alone", NoStatistics())
    for number in range(LAYERS):
        alone.finish(number)
    for path in (tmp_path / "alone" / "layers").iterdir():
        assert path.read_bytes() == (tmp_path / "cluster" / "layers" / path.name).read_bytes()


def test_a_refusal_reaches_the_user_as_it_is(address: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not to be had") as refused:
        finish_on_cluster(work_on(model, tmp_path / "work", Refusing()), tmp_path / "work", address)
    assert refused.value.fix == "ask for others"


def test_an_address_where_nothing_listens_is_named(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from rk_export.rewrite.ray_cluster import _connected\n"
        "from rk_export.errors import InputError\n"
        "try:\n    _connected('127.0.0.1:1').__enter__()\n"
        "except InputError as error:\n    print(error.where); sys.exit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 7, ended.stderr[-2000:]
    assert "--ray 127.0.0.1:1" in ended.stdout
