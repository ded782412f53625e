"""Layers that several processes finish are those that one finishes, whatever becomes of the processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_recipes import made_recipe
from tiny_models import tiny_model

from rk_export import Recipe, compress
from rk_export.calibration.layer_statistics import NoStatistics
from rk_export.errors import InputError
from rk_export.methods.prune.options import PruneOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import RankRule
from rk_export.options.run import Run
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.layer_store import LayerStore
from rk_export.rewrite.layer_work import LayerWork
from rk_export.rewrite.workers import finish_in_processes
from rk_export.source.stored import open_source
from rk_export.work_folder import work_folder_of

# They say when they were made, and how long that took.
DATED = {"report.json", "report.html", "rk_manifest.json", "README.md"}
SHORT = CalibrationOptions(tokens=512)
LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    tiny_model("llama", bos_token_id=1, num_hidden_layers=LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of each test's own; a process that is started takes it from the environment."""
    monkeypatch.setenv("RK_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / "cache")


def contents(bundle: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(bundle)): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name not in DATED
    }


RECIPES: dict[str, Callable[[], Recipe]] = {
    "formats": lambda: Recipe.load("default"),
    "pruned pairs": lambda: made_recipe(
        calibration=SHORT, rank=RankRule("keep", 0.7), methods=(PruneOptions(blocks=1),)
    ),
}


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_workers_make_the_bundle_that_one_makes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = RECIPES[name]()
    compress(model, tmp_path / "one", recipe, run=Run("cpu", 1))
    with monkeypatch.context() as patch:
        patch.setattr(
            "rk_export.rewrite.apply.finished_layer", lambda *given: pytest.fail("this process made a layer")
        )
        compress(model, tmp_path / "two", recipe, run=Run("cpu", 1, workers=2))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert not work_folder_of(tmp_path / "two").exists()


def work_on(model: Path, folder: Path, **changed: Any) -> LayerWork:
    source = open_source(model)
    plan = decide_plan(source, made_recipe(calibration=CalibrationOptions("none")))
    given = {"parts": {}, "store": LayerStore(folder / "layers"), "device": torch.device("cpu"), **changed}
    return LayerWork(source, plan, NoStatistics(), **given)


@pytest.mark.slow
def test_the_layers_of_a_killed_worker_are_made_by_another(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = work_on(model, tmp_path)
    killed: list[int] = []

    def kill_one() -> None:
        """End a process as soon as the first layer is there."""
        while len(work.missing) == LAYERS:
            time.sleep(0.001)
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid or 0, signal.SIGKILL)
        killed.append(victim.pid or 0)

    # A worker that is killed between two layers has none: more of them make the kill hit work.
    thread = threading.Thread(target=kill_one)
    thread.start()
    finish_in_processes(work, tmp_path, 2)
    thread.join()
    assert killed
    assert not work.missing
    alone = work_on(model, tmp_path / "alone")
    for index in range(LAYERS):
        alone.finish(index)
        made, expected = work.store.find(index), alone.store.find(index)
        assert made is not None
        assert expected is not None
        assert made.findings == expected.findings
        assert all(torch.equal(made.tensors[name], tensor) for name, tensor in expected.tensors.items())


class Deadly(NoStatistics):
    """Kills the process that asks for them."""

    def of_sites(self, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Refusing(NoStatistics):
    """Refuses every layer."""

    def of_sites(self, *given: Any) -> Any:
        raise InputError("is not to be had", where="statistics", fix="ask for others")
