"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rk_export.atomic import Hidden, atomic_file, beside, hidden, this_place
from rk_export.errors import InputError
from rk_export.folders import AtomicFolder
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


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was synchronized or moved, by the path that it had then."""
    done: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def note_fsync(handle: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_replace(old: Path, new: Path) -> None:
        done.append(("move", str(new)))
        replace(old, new)

    def note_rename(old: Path, new: Path) -> Path:
        done.append(("move", str(new)))
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(Path, "rename", note_rename)
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file a descriptor is")
def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_run_goes_on(
    tmp_path: Path, order: list[tuple[str, str]]
) -> None:
    path = tmp_path / "new" / "deeper" / "file"
    with atomic_file(path) as partial:
        partial.write_text("whole")
    assert order == [
        ("fsync", str(tmp_path)),  # holds `new`
        ("fsync", str(tmp_path / "new")),
        ("fsync", str(partial)),
        ("move", str(path)),
        ("fsync", str(path.parent)),
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file a descriptor is")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_is_on_the_disk_before_its_name(
    tmp_path: Path, order: list[tuple[str, str]], replaced: bool
) -> None:
    target = tmp_path / "out"
    if replaced:
        target.mkdir()
        (target / "report.json").write_text("{}")
    with AtomicFolder(target, force=True) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("whole")
        (partial / "file").write_text("whole")
        (partial / "file").chmod(0o400)
        order.clear()
    moved = order.index(("move", str(target)))
    before = [path for what, path in order[:moved] if what == "fsync"]
    places = ("inner/file", "inner", "file", ".")
    assert sorted(before) == sorted(os.path.normpath(partial / place) for place in places)
    assert before.index(str(partial)) == 3
    assert before.index(str(partial / "inner" / "file")) < before.index(str(partial / "inner"))
    assert order[moved + 1] == ("fsync", str(tmp_path))


def test_a_disk_that_cannot_take_a_file_fails_before_the_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"), atomic_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_synchronized_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no folders")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_a_hidden_path_names_its_output_and_its_process(tmp_path: Path) -> None:
    left = hidden(beside(tmp_path / "my.out.old-1", "partial"))
    assert left == Hidden(tmp_path / "my.out.old-1", "partial", this_place(), os.getpid())
    for other in ("out", ".out", ".out.heal", ".out.partial-1", ".out.partial-0123abcd"):
        assert hidden(tmp_path / other) is None


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
