"""What a file of a folder may name: files in that folder, links followed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rk_export.errors import InputError
from rk_export.inside import check_links, copy_inside, file_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_text("a")
    (folder / "inner" / "b.bin").write_text("b")
    return folder


@pytest.mark.parametrize("name", ["a.bin", "inner/b.bin", "./a.bin", "inner/./b.bin"])
def test_names_inside_are_taken(folder: Path, name: str) -> None:
    assert file_inside(folder, name, where="x").read_text() in "ab"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "outside the folder")
            for name in ("../secret", "inner/../../secret", "/etc/passwd", "//x/y")
        ),
        *(
            (name, "outside the folder")
            for name in ("C:\\x", "C:x", "..\\secret", "inner\\..\\..\\secret", "\\x")
        ),
        *((name, "no name of a file") for name in ("", "a\0b", "\ud800", None, 3, ["a.bin"], {})),
        *((name, "no regular file") for name in ("inner", ".", "pipe")),
        *((name, "a link that leads out") for name in ("out", "far/secret", "twice")),
        *((name, "cannot be read") for name in ("absent", "a.bin/x", "loop", "x" * 5000)),
    ],
)
def test_other_names_are_refused(folder: Path, name: Any, message: str) -> None:
    (folder / "out").symlink_to("../secret")
    (folder / "twice").symlink_to("out")
    (folder / "far").symlink_to(folder.parent, target_is_directory=True)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match=message) as refusal:
        file_inside(folder, name, where="config.json")
    assert refusal.value.where == "config.json"


def test_links_inside_are_followed(folder: Path) -> None:
    (folder / "link").symlink_to("inner/b.bin")
    assert file_inside(folder, "link", where="x").read_text() == "b"
    (folder.parent / "other").symlink_to(folder, target_is_directory=True)
    assert file_inside(folder.parent / "other", "link", where="x").read_text() == "b"
    check_links(folder.parent / "other")


def test_a_snapshot_of_the_hub_may_link_to_its_blobs_and_nowhere_else(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "snapshots" / "123"
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    place.mkdir(parents=True)
    (tmp_path / "cache" / "blobs" / "0").write_text("blob")
    (place / "a").symlink_to("../../blobs/0")
    assert file_inside(place, "a", where="x").read_text() == "blob"
    check_links(place)
    (place / "b").symlink_to("../../../secret")
    with pytest.raises(InputError, match="leads out"):
        file_inside(place, "b", where="x")
    with pytest.raises(InputError, match="leads out"):
        check_links(place)


def test_a_link_deep_in_a_folder_is_found(folder: Path) -> None:
    check_links(folder)
    (folder / "inner" / "out").symlink_to("../..", target_is_directory=True)
    with pytest.raises(InputError, match=r"inner/out: a link"):
        check_links(folder)


def test_what_a_link_shows_is_not_copied(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    copy_inside(folder, "inner/b.bin", target)
    assert (target / "inner" / "b.bin").read_text() == "b"
    (folder / "merges.txt").symlink_to("../secret")
    with pytest.raises(InputError, match="leads out"):
        copy_inside(folder, "merges.txt", target)
    assert not (target / "merges.txt").exists()
