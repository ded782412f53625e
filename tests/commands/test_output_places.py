"""Where outputs may not go: over what is read, over each other, over what is no output; said before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Cli
from gguf_files import model_for_gguf, write_gguf

DENSE = ("--recipe", "floats", "--device", "cpu")


@pytest.fixture
def prepared(cli: Cli, llama: Path, tmp_path: Path) -> Path:
    """A model folder that rk-export wrote, so that --force may replace it."""
    folder = tmp_path / "prepared"
    assert cli("prepare", llama, "-o", folder, "--passes", "fold").code == 0
    return folder


def held(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder with their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["compress", "export", "prepare", "analyze"])
def test_force_never_replaces_the_model_that_is_read(cli: Cli, prepared: Path, command: str) -> None:
    before = held(prepared)
    words = DENSE if command == "compress" else ()
    ended = cli(command, prepared, "-o", prepared, "--force", *words)
    assert (ended.code, "would take the place of what is read" in ended.err) == (2, True), ended.err
    assert held(prepared) == before


def test_force_never_replaces_a_folder_around_the_model(cli: Cli, prepared: Path) -> None:
    inner = Path(shutil.copytree(prepared, prepared / "inner"))
    link = prepared.parent / "link"
    link.symlink_to(inner)
    for model in (inner, link):
        ended = cli("compress", model, "-o", prepared, "--force", *DENSE)
        assert (ended.code, "would take the place of what is read" in ended.err) == (2, True), ended.err
    assert (inner / "model.safetensors").is_file()


@pytest.mark.whole
def test_a_checkpoint_is_not_exported_over_itself(cli: Cli, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert cli("compress", llama, "-o", tmp_path / "out", *DENSE, "--checkpoint", folder).code == 0
    ended = cli("export", folder, "-o", folder, "--force")
    assert (ended.code, "would take the place of what is read" in ended.err) == (2, True), ended.err
    assert (folder / "model.safetensors").is_file()


def test_bundle_and_checkpoint_need_two_places(cli: Cli, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = cli("compress", llama, "-o", out, *DENSE, "--checkpoint", out)
    assert (ended.code, out.exists()) == (2, False), ended.err


@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=["compress", "dry-run"])
def test_a_place_that_cannot_hold_the_output(
    cli: Cli, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("text")
    for out, what in (
        ("file", "is not a folder"),
        ("file/out", "Not a directory"),
        ("full", "the output already exists"),
    ):
        ended = cli("compress", llama, "-o", tmp_path / out, *DENSE, *extra)
        assert (ended.code, what in ended.err) == (2, True), ended.err
        assert "check:" not in ended.err
    monkeypatch.setattr("rk_export.folders.os.access", lambda *_: False)
    ended = cli("compress", llama, "-o", tmp_path / "denied", *DENSE, *extra)
    assert (ended.code, "Permission denied" in ended.err) == (2, True), ended.err


def test_a_plan_replaces_plans_only(cli: Cli, llama: Path, tmp_path: Path) -> None:
    plan, config = tmp_path / "plan.json", tmp_path / "config.json"
    shutil.copy(llama / "config.json", config)
    for _ in range(2):
        assert cli("plan", llama, "-o", plan, "--force", "--recipe", "joint-rank").code == 0
    for place, what in (
        (config, "the file is no plan"),
        (tmp_path, "is a folder"),
        (tmp_path / "absent" / "plan.json", "no such folder"),
    ):
        ended = cli("plan", llama, "-o", place, "--force", "--recipe", "joint-rank")
        assert (ended.code, what in ended.err) == (2, True), ended.err
    assert config.read_bytes() == (llama / "config.json").read_bytes()


def test_force_never_replaces_the_folder_of_a_gguf_file(cli: Cli, prepared: Path) -> None:
    path = write_gguf(prepared / "tiny.gguf", model_for_gguf("llama"))
    ended = cli("compress", path, "-o", prepared, "--force", *DENSE)
    assert (ended.code, "would take the place of what is read" in ended.err) == (2, True), ended.err
    assert path.is_file()
