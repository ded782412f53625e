"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rk_export.atomic import atomic_file, beside
from rk_export.errors import InputError
from rk_export.options.recipe import Recipe
from rk_export.plan import Plan
from rk_export.tensor_cache import write_tensors
from rk_export.training.state import StateFile, TrainingState


def test_the_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as partial:
        partial.write_text("whole")
        assert partial.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def _write_and_fail(path: Path, error: BaseException) -> None:
    with atomic_file(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        _write_and_fail(path, error)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file.txt"]


def test_what_is_beside_is_hidden_and_new(tmp_path: Path) -> None:
    first, second = (beside(tmp_path / "out", "partial") for _ in range(2))
    assert first != second
    assert first.parent == tmp_path
    assert first.name.startswith(".out.partial-")


STATE = TrainingState("run", 1, ((1, 2.0),), 1.0, {"weight": torch.ones(2)}, {})


Writer = Callable[[Path], object]
WRITERS: dict[str, Writer] = {
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(3)}),
    "state": lambda path: StateFile(path, "run").write(STATE),
    "plan": lambda path: Plan("llama", "fingerprint", Recipe(), (), None).save(path),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_every_writer_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Writer
) -> None:
    path = tmp_path / "file"
    writer(path)
    assert path.stat().st_size > 0
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with contextlib.suppress(OSError, InputError):
        writer(path)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
