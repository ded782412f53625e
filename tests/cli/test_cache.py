"""The command `cache`: what it lists and what it removes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli

from rk_export import tensor_cache
from rk_export.cache_limit import chosen_limit, release, use
from rk_export.tensor_cache import cache_file, name_model, write_tensors

SIZES = {"old": 10_000, "new": 20_000, "statistics": 40_000}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(tensor_cache, "CACHE", folder)
    monkeypatch.setenv("RK_EXPORT_CACHE_LIMIT", "1GB")
    return folder


@pytest.fixture
def kept(root: Path) -> dict[str, Path]:
    """Entries of the cache, none of them used by this process, and a download of the samples."""
    name_model("0123", "a-model")
    keys = {
        "old": ("self-text", {"model": "0123", "seed": 1}, 40),
        "new": ("self-text", {"model": "4567"}, 20),
        "statistics": ("dense-statistics", {"model": "0123"}, 10),
    }
    paths = {}
    for name, (kind, key, days) in keys.items():
        paths[name] = path = cache_file(kind, key, root)
        write_tensors(path, {"values": torch.zeros(SIZES[name], dtype=torch.uint8)})
        release(path)
        os.utime(path, (time.time() - days * 86_400,) * 2)
    paths["model"] = root / "gguf" / f"{1:016x}-v2"
    paths["asset"] = root / "assets" / "wheel-1.0"
    for name, inner in (("model", "tiny"), ("asset", "inner")):
        (paths[name] / inner).mkdir(parents=True)
        (paths[name] / inner / "model.safetensors").write_bytes(bytes(30_000))
    return paths


def there(kept: dict[str, Path]) -> set[str]:
    return {name for name, path in kept.items() if path.exists()}


def document(cli: Cli, *words: object) -> Any:
    ended = cli("cache", *words, "--json", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    return json.loads(ended.out)


def test_it_lists_kinds_models_sizes_and_times(cli: Cli, root: Path, kept: dict[str, Path]) -> None:
    found = document(cli)
    assert (found["folder"], found["limit"]) == (str(root), 10**9)
    assert found["bytes"] == sum(entry["bytes"] for entry in found["entries"]) >= 130_000
    entries = {entry["path"]: entry for entry in found["entries"]}
    assert set(entries) == {path.relative_to(root).as_posix() for path in kept.values()}
    models = {name: entries[path.relative_to(root).as_posix()]["model"] for name, path in kept.items()}
    expected = {"old": "a-model", "new": None, "statistics": "a-model", "model": "tiny", "asset": None}
    assert models == expected
    assert document(cli) == found  # to look is no use
    text = cli("cache").out
    assert text.splitlines()[0].split() == ["kind", "model", "files", "size", "last", "used"]
    day = time.strftime("%Y-%m-%d", time.localtime(time.time() - 40 * 86_400))
    assert any(
        line.startswith("self-text") and "a-model" in line and day in line for line in text.splitlines()
    )
    assert f"{root}: 13" in text
    assert "limit 1.00 GB" in text


def test_an_empty_cache_is_listed(cli: Cli, root: Path) -> None:
    assert document(cli)["entries"] == []
    assert cli("cache").out == f"{root}: 0 B, limit 1.00 GB\n"
    assert document(cli, "--prune", "--all")["removed"] == []


@pytest.mark.parametrize(
    ("words", "goes"),
    [
        ((), set()),
        (("--to", "95KB"), {"old"}),
        (("--to", "85KB"), {"old", "new"}),
        (("--older-than", "15"), {"old", "new"}),
        (("--kind", "self-text"), {"old", "new"}),
        (("--kind", "self-text", "--to", "25KB"), {"old"}),
        (("--kind", "self-text", "--older-than", "30"), {"old"}),
        (("--kind", "assets"), {"asset"}),
        (("--to", "0"), {"old", "new", "statistics", "model"}),
        (("--all",), {"old", "new", "statistics", "model", "asset"}),
    ],
)
def test_what_is_asked_for_goes(
    cli: Cli, root: Path, kept: dict[str, Path], words: tuple[str, ...], goes: set[str]
) -> None:
    before = document(cli)
    would = document(cli, "--prune", *words, "--dry-run")
    assert there(kept) == set(kept)
    found = document(cli, "--prune", *words)
    assert there(kept) == set(kept) - goes
    assert {entry["path"] for entry in found["removed"]} == {
        kept[name].relative_to(root).as_posix() for name in goes
    }
    assert found["freed"] + found["bytes"] == before["bytes"]
    assert document(cli)["bytes"] == found["bytes"]
    assert would == {**found, "dry_run": True}


def test_a_prune_without_a_choice_goes_down_to_the_limit(
    cli: Cli, kept: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RK_EXPORT_CACHE_LIMIT", "95KB")
    ended = cli("cache", "--prune")
    assert ended.code == 0
    assert there(kept) == set(kept) - {"old"}
    assert "a-model" in ended.out
    assert "10.1 kB removed" in ended.out


def test_what_is_used_stays_and_is_named(cli: Cli, kept: dict[str, Path]) -> None:
    use(kept["model"])
    try:
        for words in (("--dry-run",), ()):
            ended = cli("cache", "--prune", "--all", *words)
            assert f"in use, not removed: gguf/{kept['model'].name}" in ended.out
        assert there(kept) == {"model"}
    finally:
        release(kept["model"])


def test_leftovers_go_with_every_prune(cli: Cli, root: Path, kept: dict[str, Path]) -> None:
    left = root / "self-text" / ".x.safetensors.partial-ffffffff-1-0123abcd"
    left.touch()
    os.utime(left, (0, 0))
    assert document(cli, "--prune", "--dry-run")["leftovers"] == ["self-text/" + left.name]
    assert left.exists()
    assert "left half-written by killed runs: 1" in cli("cache", "--prune").out
    assert not left.exists()


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("words", "where", "what"),
    [
        (("--to", "1GB"), "--to", "goes with --prune"),
        (("--older-than", "1"), "--older-than", "goes with --prune"),
        (("--kind", "gguf"), "--kind", "goes with --prune"),
        (("--all",), "--all", "goes with --prune"),
        (("--dry-run",), "--dry-run", "goes with --prune"),
        (("--prune", "--to", "much"), "--to", "'much' is no size"),
        (("--prune", "--older-than", "-1"), "--older-than", "-1 days are no age"),
        (("--prune", "--older-than", "nan"), "--older-than", "nan days are no age"),
        (("--prune", "--kind", "texts"), "--kind", "the cache holds no 'texts'"),
        (("--prune", "--all", "--kind", "gguf"), "--kind and --all", "say different things"),
        (("--prune", "--all", "--to", "1GB"), "--to, --older-than and --all", "say different things"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    cli: Cli, root: Path, words: tuple[str, ...], where: str, what: str
) -> None:
    before = sorted(root.rglob("*"))
    ended = cli("cache", *words, "--json")
    assert (ended.code, ended.out) == (2, "")
    error = json.loads(ended.err)["error"]
    assert (error["where"], error["what"]) == (where, what)
    assert error["fix"]
    assert sorted(root.rglob("*")) == before


@pytest.mark.slow
def test_a_limit_of_the_line_holds_while_the_command_runs(
    cli: Cli, llama: Path, tmp_path: Path, kept: dict[str, Path]
) -> None:
    options = ("--set", "calibration.tokens=512", "--cache-limit", "1KB")
    assert cli("plan", llama, "-o", tmp_path / "plan.json", *options).code == 0
    assert there(kept) == {"asset"}
    with chosen_limit(None):
        assert os.environ["RK_EXPORT_CACHE_LIMIT"] == "1GB"
