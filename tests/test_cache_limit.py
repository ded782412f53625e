"""The cache stays within its limit: what was not used for the longest time goes, what is used stays."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rk_export import cache_limit
from rk_export.cache_limit import (
    cache_entries,
    chosen_limit,
    is_used,
    keep_within_limit,
    release,
    remove_entry,
    use,
    use_folder,
)
from rk_export.errors import InputError
from rk_export.tensor_cache import cache_file, cached, model_of, name_model, read_tensors, write_tensors

KEPT = {"values": torch.zeros(2500)}  # 10 kB and a header


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make(root: Path, kind: str, number: int, days: float = 0.0) -> Path:
    """Write an entry of 10 kB as an earlier process did, last used so many days ago."""
    path = root / kind / f"{number:032x}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(10_000))
    return age(path, days)


def make_model(root: Path, number: int, days: float = 0.0) -> Path:
    """Write a converted model of 10 kB, last used so many days ago."""
    path = root / "gguf" / f"{number:016x}-v2"
    (path / "tiny").mkdir(parents=True)
    (path / "tiny" / "model.safetensors").write_bytes(bytes(10_000))
    return age(path, days)


def age(path: Path, days: float) -> Path:
    os.utime(path, (time.time() - days * 86_400,) * 2)
    return path


def names(root: Path) -> list[Path]:
    return sorted(entry.path for entry in cache_entries(root))


def test_the_oldest_go_until_the_limit_holds(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    old, older = make(root, "self-text", 1, days=3), make_model(root, 2, days=4)
    new = make(root, "dense-statistics", 3, days=1)
    with chosen_limit("100KB"):
        assert keep_within_limit(root) == []
    assert caplog.text == ""
    with chosen_limit("15KB"):
        assert [entry.path for entry in keep_within_limit(root)] == [older, old]
    assert names(root) == [new]
    assert not older.exists()
    assert f"gguf/{older.name}, 10.0 kB, last used " in caplog.text
    assert f"self-text/{old.name}" in caplog.text
    assert new.name not in caplog.text


def test_a_hit_is_a_use(root: Path) -> None:
    first = cache_file("self-text", {"text": 1}, root)
    write_tensors(first, KEPT)
    release(first)  # as if another process had written it
    age(first, days=9)
    second = make(root, "self-text", 2, days=3)
    assert read_tensors(first) is not None
    release(first)
    assert [entry.path for entry in cache_entries(root)] == [second, first]


def test_what_this_run_used_stays_and_the_log_says_so_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stale = make(root, "self-text", 1, days=3)
    with chosen_limit("5KB"):
        for number in range(3):
            cached("moments", {"number": number}, lambda: KEPT, root)
    assert not stale.exists()
    assert len(names(root)) == 3
    assert caplog.text.count("the cache is larger than its limit") == 1
    assert caplog.text.count("removed from the cache") == 1


HOLDS = """
import sys
from pathlib import Path
from rk_export.cache_limit import use_folder
use_folder(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


@pytest.mark.slow
@pytest.mark.skipif(cache_limit.fcntl is None, reason="there are no locks of folders")
def test_a_model_that_another_process_uses_stays(root: Path) -> None:
    model = make_model(root, 1, days=3)
    command = [sys.executable, "-c", HOLDS, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (entry,) = cache_entries(root)
        assert time.time() - entry.used < 60
        assert is_used(entry)
        assert not remove_entry(entry)
        process.kill()
    assert not is_used(entry)
    assert remove_entry(entry)
    assert list(root.rglob("*")) == [root / "gguf"]


def test_a_folder_is_used_from_its_first_moment_on(root: Path) -> None:
    path = root / "gguf" / f"{1:016x}-v2"
    use_folder(path)
    use_folder(path)
    (entry,) = cache_entries(root)
    assert (entry.files, entry.bytes) == (0, 0)
    assert not remove_entry(entry)
    release(path)
    assert remove_entry(entry)
    assert remove_entry(entry)  # another process was quicker
    with pytest.raises(FileNotFoundError):
        use(path)


def test_nothing_else_is_touched(root: Path) -> None:
    """The variable may name a folder that holds other things, too."""
    others = [
        root / "letters" / "letter.txt",
        root / "self-text" / "notes.safetensors",
        root / "gguf" / "mine" / "model.safetensors",
        root / "assets" / "wheel-1.0" / "model.gguf",
        root / f"{1:032x}.safetensors",
    ]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(bytes(10_000))
    (root / "gguf" / f"{2:016x}-v2").symlink_to(root / "letters")
    with chosen_limit("0"):
        assert keep_within_limit(root) == []
        write_tensors(root / "letters" / "tensors", KEPT)  # no file of the cache
    assert all(other.exists() for other in others)
    assert [entry.kind for entry in cache_entries(root)] == ["assets"]


def test_a_cache_that_is_not_there_is_empty(root: Path) -> None:
    assert cache_entries(root) == []
    assert keep_within_limit(root) == []
    assert not root.exists()


def test_what_a_killed_run_left_in_the_cache_goes(root: Path) -> None:
    model = make_model(root, 1)
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    process = int(gone.stdout)
    place = cache_limit.beside(root / "x", "partial").name.split("-")[1]
    left = [
        root / f".fingerprints.json.partial-{place}-{process}-0123abcd",
        root / "gguf" / f".x.safetensors.partial-{place}-{process}-0123abcd",
        model / f".tiny.partial-{place}-{process}-0123abcd",
    ]
    for path in left:
        path.touch()
    mine = cache_limit.beside(root / "x", "partial")
    mine.touch()
    keep_within_limit(root)
    assert not any(path.exists() for path in left)
    assert mine.exists()


def test_a_cache_that_cannot_be_changed_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(root, "self-text", 1)

    def refuse(_: Path) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "unlink", refuse)
    with chosen_limit("1KB"):
        assert keep_within_limit(root) == []
    assert "the cache is not kept within its limit: not yours" in caplog.text


def test_the_limit_comes_from_the_line_or_the_environment_or_the_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RK_EXPORT_CACHE_LIMIT", raising=False)
    disk = [10**13, 0, 0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": disk[0]}))
    assert cache_limit.cache_limit(root) == 20_000_000_000
    disk[0] = 10**10
    assert cache_limit.cache_limit(root) == 1_000_000_000
    monkeypatch.setenv("RK_EXPORT_CACHE_LIMIT", "3GB")
    assert cache_limit.cache_limit(root) == 3_000_000_000
    with chosen_limit("2GB"):
        assert cache_limit.cache_limit(root) == 2_000_000_000
    assert os.environ["RK_EXPORT_CACHE_LIMIT"] == "3GB"


@pytest.mark.parametrize("text", ["much", "-1GB", "int4"])
def test_no_size_is_refused_before_the_work(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--cache-limit.*is no size"), chosen_limit(text):
        pytest.fail("the work began")
    monkeypatch.setenv("RK_EXPORT_CACHE_LIMIT", text)
    with pytest.raises(InputError, match=r"RK_EXPORT_CACHE_LIMIT.*is no size"), chosen_limit(None):
        pytest.fail("the work began")


def test_a_file_names_its_model(root: Path) -> None:
    name_model("0123", "a-model")
    path, other = (cache_file("moments", {"model": model}, root) for model in ("0123", "4567"))
    for one in (path, other):
        write_tensors(one, KEPT)
    (root / "moments" / "broken").write_text("broken")
    assert [model_of(one) for one in (path, other, root / "moments" / "broken")] == ["a-model", "", ""]
