"""Files are known by their content, which is read once as long as size and time stay the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rk_export.source import fingerprints
from rk_export.source.fingerprints import INDEX, files_fingerprint


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    names: list[str] = []
    digest = fingerprints.sha256_of

    def counted(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(fingerprints, "sha256_of", counted)
    return names


def written(folder: Path) -> tuple[Path, Path]:
    files = folder / "config.json", folder / "model.safetensors"
    for file in files:
        file.write_text(file.name)
    return files


def test_a_file_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    files = written(tmp_path)
    first = files_fingerprint(files, tmp_path / "cache")
    assert files_fingerprint(files, tmp_path / "cache") == first
    assert hashed == ["config.json", "model.safetensors"]
    files[0].write_text("another")
    assert files_fingerprint(files, tmp_path / "cache") != first
    assert hashed[2:] == ["config.json"]


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path, hashed: list[str]) -> None:
    files = written(tmp_path)
    first = files_fingerprint(files, tmp_path / "cache")
    os.utime(files[1], ns=(1, 1))
    assert files_fingerprint(files, tmp_path / "cache") == first  # the content is the same
    assert hashed[2:] == ["model.safetensors"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\x00"])
def test_a_broken_index_is_made_anew(tmp_path: Path, hashed: list[str], content: str) -> None:
    files = written(tmp_path)
    first = files_fingerprint(files, tmp_path / "cache")
    (tmp_path / "cache" / INDEX).write_text(content)
    assert files_fingerprint(files, tmp_path / "cache") == first
    assert files_fingerprint(files, tmp_path / "cache") == first
    assert len(hashed) == 4


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, hashed: list[str]) -> None:
    files = written(tmp_path)
    (tmp_path / "cache").write_text("a file stands in its place")
    assert files_fingerprint(files, tmp_path / "cache") == files_fingerprint(files, tmp_path / "cache")
    assert len(hashed) == 4
