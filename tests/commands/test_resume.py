"""A compression that ends at any point goes on, and its bundle is that of a run that was never interrupted."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_recipes import made_recipe
from safetensors import SafetensorError
from tiny_models import tiny_model

from rk_export import Recipe, compress
from rk_export.errors import InputError
from rk_export.methods.heal.options import HealOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import RankRule
from rk_export.options.run import Run
from rk_export.rewrite.layer_store import LayerStore
from rk_export.work_folder import WorkFolder, work_folder_of

pytestmark = pytest.mark.whole

# They say when they were made, and how long that took.
DATED = {"report.json", "report.html", "rk_manifest.json", "README.md"}
RUN = Run(device="cpu", threads=1)
SHORT = CalibrationOptions(tokens=512)


class Killed(BaseException):
    """The process ends: nothing catches it but what runs at every end."""


def recipes() -> dict[str, Recipe]:
    return {
        "formats": Recipe.load("default"),
        "pairs": made_recipe(calibration=SHORT, rank=RankRule("keep", 0.7)),
        "healed": made_recipe(calibration=SHORT, methods=(HealOptions(steps=3, batch_tokens=512),)),
        "rotated": made_recipe(calibration=SHORT, prepare=("fold", "rotate")),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model("llama", bos_token_id=1, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose a cache of one's own."""

    def choose(name: str) -> None:
        monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / name)

    choose("cache")
    return choose


def contents(bundle: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(bundle)): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.name not in DATED
    }


def parity_errors(bundle: Path) -> list[tuple[str, float | None]]:
    """Return what each tier measured: a report is dated, its figures are not."""
    report = json.loads((bundle / "report.json").read_text())
    return [(tier["tier"], tier["max_error"]) for tier in report["parity"]]


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process instead of finishing the write of that number."""
    left, replace = [count], os.replace

    def or_end(*arguments: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(*arguments, **named)

    monkeypatch.setattr("rk_export.atomic.os.replace", or_end)


def writes_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """Return how many writes a run finishes."""
    made, replace = [0], os.replace

    def counted(*arguments: Any, **named: Any) -> None:
        made[0] += 1
        replace(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("rk_export.atomic.os.replace", counted)
        run()
    return made[0]


@pytest.mark.parametrize("name", recipes())
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bundle(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: Callable[[str], None],
    name: str,
) -> None:
    recipe = recipes()[name]
    writes = writes_of(monkeypatch, lambda: compress(model, tmp_path / "whole", recipe, run=RUN))
    expected = contents(tmp_path / "whole")
    cache("other cache")
    out = tmp_path / "out"
    points = random.Random(name).sample(range(1, writes + 1), min(9, writes))
    for point in points:
        with monkeypatch.context() as patch:
            killed_at(point, patch)
            try:
                compress(model, out, recipe, run=RUN)
            except Killed:
                continue
        break  # what was left had fewer writes than that
    if not out.exists():
        compress(model, out, recipe, run=RUN)
    assert contents(out) == expected
    assert parity_errors(out) == parity_errors(tmp_path / "whole")
    assert not work_folder_of(out).exists()


def killed_after(writes: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_at(writes, patch)
        with pytest.raises(Killed):
            run()


@pytest.fixture
def unfinished(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output whose run ended when its last layer was finished."""
    out, recipe = tmp_path / "out", made_recipe(calibration=SHORT)
    layers = work_folder_of(out) / "layers"

    keep = LayerStore.keep

    def keep_and_end(self: Any, index: int, layer: Any) -> None:
        keep(self, index, layer)
        if index == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "keep", keep_and_end)
        with pytest.raises(Killed):
            compress(model, out, recipe, run=RUN)
    assert len(list(layers.glob("layer-*.json"))) == 2
    return out


def test_finished_layers_are_not_made_again(
    unfinished: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rk_export.rewrite.apply.finished_layer", lambda *given: pytest.fail("a layer was made again")
    )
    compress(model, unfinished, made_recipe(calibration=SHORT), run=RUN)
    assert (unfinished / "model.onnx").is_file()


def test_a_damaged_layer_is_made_again(
    unfinished: Path,
    tmp_path: Path,
    model: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = work_folder_of(unfinished) / "layers" / "layer-00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    compress(model, unfinished, made_recipe(calibration=SHORT), run=RUN)
    assert "layer-00001 is made again" in caplog.text
    compress(model, tmp_path / "whole", made_recipe(calibration=SHORT), run=RUN)
    assert contents(unfinished) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("what", "seed", "tokens"), [("the model", 5, 512), ("the recipe", 0, 1024)], ids=["model", "recipe"]
)
def test_what_changed_since_is_refused_by_name(
    unfinished: Path, model: Path, what: str, seed: int, tokens: int
) -> None:
    recipe = made_recipe(calibration=CalibrationOptions(tokens=tokens))
    if seed:
        tiny_model("llama", bos_token_id=1, seed=seed).save_pretrained(model)
    with pytest.raises(InputError, match=f"{what} changed since") as refused:
        compress(model, unfinished, recipe, run=RUN)
    assert "--no-resume" in str(refused.value)
    assert len(list((work_folder_of(unfinished) / "layers").glob("layer-*.json"))) == 2
    compress(model, unfinished, recipe, run=RUN, resume=False)
    assert (unfinished / "model.onnx").is_file()


def no_room_for_states(patch: pytest.MonkeyPatch) -> None:
    """Have a full disk take what need not stay in memory; NumPy says so in words of its own."""

    def full(handle: int, mode: str) -> Any:
        os.close(handle)
        return open("/dev/full", mode)

    patch.setattr("rk_export.scratch.os.fdopen", full)


def no_room_for_layers(patch: pytest.MonkeyPatch) -> None:
    """Have safetensors meet a full disk when a layer is finished."""

    def full(*given: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    patch.setattr("rk_export.rewrite.layer_store.save_file", full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("fill", [no_room_for_states, no_room_for_layers])
def test_a_run_that_a_full_disk_ended_goes_on_when_there_is_space(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    out, recipe = tmp_path / "out", made_recipe(calibration=SHORT)
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(InputError, match="no space left on the disk") as refused:
            compress(model, out, recipe, run=RUN)
    assert "free some space" in str(refused.value)
    assert not out.exists()
    compress(model, out, recipe, run=RUN)
    compress(model, tmp_path / "whole", recipe, run=RUN)
    assert contents(out) == contents(tmp_path / "whole")
    assert not work_folder_of(out).exists()


def test_two_runs_of_one_output_are_refused(unfinished: Path, model: Path) -> None:
    with WorkFolder(unfinished), pytest.raises(InputError, match=f"process {os.getpid()}"):
        compress(model, unfinished, made_recipe(calibration=SHORT), run=RUN)


def test_the_lock_of_a_dead_process_holds_nobody_up(unfinished: Path, model: Path) -> None:
    assert (work_folder_of(unfinished) / "holder").read_text() == str(os.getpid())
    compress(model, unfinished, made_recipe(calibration=SHORT), run=RUN)
    assert (unfinished / "model.onnx").is_file()
