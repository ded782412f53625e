"""Layers that several processes finish are those that one finishes, whatever becomes of the processes."""

from __future__ import annotations

import importlib.util
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
from bundle_bytes import contents
from made_recipes import made_recipe
from tiny_models import tiny_model

from rk_export import Recipe, compress
from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.layer_statistics import FromDense, FromPrefix, LayerStatistics, NoStatistics
from rk_export.errors import FieldError, InputError, RkExportError
from rk_export.matrix_id import MatrixId
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.prune.pruned import Pruned
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import RankRule
from rk_export.options.run import Run
from rk_export.plan import Pruning
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.ahead import finish_ahead
from rk_export.rewrite.layer_store import LayerStore
from rk_export.rewrite.layer_work import LayerWork, unpacked
from rk_export.rewrite.workers import finish_in_processes
from rk_export.source.stored import open_source
from rk_export.tensor_cache import cache_file, read_tensors, write_tensors
from rk_export.work_folder import work_folder_of

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


def work_on(model: Path, folder: Path, statistics: LayerStatistics | None = None) -> LayerWork:
    source = open_source(model)
    plan = decide_plan(source, made_recipe(calibration=CalibrationOptions("none")))
    store = LayerStore(folder / "layers")
    return LayerWork(source, plan, statistics or NoStatistics(), {}, store, torch.device("cpu"))


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

    thread = threading.Thread(target=kill_one)
    thread.start()
    finish_in_processes(work, tmp_path, 2)
    thread.join()
    assert killed
    assert "a worker was killed" in caplog.text
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


@pytest.mark.slow
def test_a_layer_that_kills_every_worker_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RkExportError, match="layer 0: the process that had it ended 2 times") as refused:
        finish_in_processes(work_on(model, tmp_path, Deadly()), tmp_path, 1)
    assert "memory" in str(refused.value)


@pytest.mark.slow
def test_a_refusal_in_a_worker_reaches_the_user_as_it_is(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match="is not to be had") as refused:
        finish_in_processes(work_on(model, tmp_path, Refusing()), tmp_path, 1)
    assert (refused.value.where, refused.value.fix) == ("statistics", "ask for others")
    assert not multiprocessing.active_children()


def test_statistics_through_the_layers_before_say_why_no_worker_helps(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(model)
    dense = FromDense(DenseStatistics({}, {}, {}, {}, 1))
    prefix = FromPrefix(dense, torch.zeros(1, 4, dtype=torch.int64), source.architecture)
    finish_ahead(work_on(model, tmp_path, prefix), tmp_path, Run("cpu", workers=2))
    assert "calibration.prefix" in caplog.text
    assert not (tmp_path / "layers").exists()


def test_tensors_of_the_cache_travel_as_places_in_its_files(tmp_path: Path, model: Path) -> None:
    path = cache_file("dense-statistics", {"of": "a test"})
    write_tensors(path, {"second": torch.randn(512, 512)})
    known = read_tensors(path)
    assert known is not None
    place = MatrixId(0, "self_attn.q_proj")
    statistics = DenseStatistics({place: known["second"]}, {}, {place: 1.0}, {place: torch.ones(64)}, 7)
    packed = work_on(model, tmp_path, FromDense(statistics)).packed(tmp_path)
    assert len(packed) < known["second"].nbytes / 10
    work = unpacked(packed)
    assert isinstance(work.statistics, FromDense)
    assert torch.equal(work.statistics.known.second[place], known["second"])
    assert torch.equal(work.statistics.known.gradients[place], torch.ones(64))
    assert [item.name for item in tmp_path.glob("*.safetensors")] == ["handed.safetensors"]


def test_a_source_travels_as_its_folder_and_its_changes(tmp_path: Path, model: Path) -> None:
    stored = open_source(model)
    pruned = stored.then(Pruned(stored.description, Pruning((0, 2, 3)), None, torch.device("cpu")))
    plan = decide_plan(pruned, made_recipe(calibration=CalibrationOptions("none")))
    store = LayerStore(tmp_path / "layers")
    work = LayerWork(pruned, plan, NoStatistics(), {}, store, torch.device("cpu"))
    there = unpacked(work.packed(tmp_path)).source
    assert (there.name, there.fingerprint(tmp_path)) == (pruned.name, pruned.fingerprint(tmp_path))
    assert there.layer_count == 3
    for layer, expected in zip(there.layers(), pruned.layers(), strict=True):
        tensors = layer.module.state_dict()
        assert all(torch.equal(tensors[name], t) for name, t in expected.module.state_dict().items())


@pytest.mark.parametrize("changed", [{"workers": 0}, {"workers": 2, "ray": "auto"}], ids=["none", "both"])
def test_a_wrong_number_of_workers_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="workers"):
        Run("cpu", **changed)


def test_a_cluster_without_ray_says_what_to_install(tmp_path: Path, model: Path) -> None:
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("Ray is installed")
    with pytest.raises(InputError, match="Ray is not installed") as refused:
        finish_ahead(work_on(model, tmp_path), tmp_path, Run("cpu", ray="127.0.0.1:6379"))
    assert "rk-export[ray]" in str(refused.value)
