"""The tests' own order: what runs whole pipelines says so, and files are no libraries of each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import whole_runs

from rk_export import Recipe, compress, export

TESTS = Path(__file__).parents[1]


def _imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


def test_test_files_are_imported_by_none() -> None:
    files = {path.stem for path in TESTS.rglob("test_*.py")}
    users = {str(path.relative_to(TESTS)): _imported(path) & files for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in users.items() if names} == {}


def test_a_name_is_no_file_s_twice() -> None:
    """Test files and helpers are imported by their names alone, whatever the folder."""
    names = [path.stem for path in TESTS.rglob("*.py") if path.stem not in ("__init__", "conftest")]
    inside = [path.stem for path in (TESTS / "input_cases").glob("*.py")]
    loose = [name for name in names if name not in inside]
    assert len(loose) == len(set(loose))


@pytest.mark.parametrize(("command", "asked"), [(compress, {"recipe": Recipe()}), (export, {})])
def test_a_whole_run_without_the_marker_fails(
    llama: Path, tmp_path: Path, command: Callable[..., object], asked: dict[str, Recipe]
) -> None:
    with pytest.raises(pytest.fail.Exception, match="makes the graph"):
        command(llama, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_whole_run_in_another_process_fails_too(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rk_export.cli.main", "export", str(llama), "-o", str(tmp_path / "out")]
    with pytest.raises(pytest.fail.Exception, match="makes the graph"):
        subprocess.run(command, check=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.whole
def test_a_marked_one_may_run(bundle: Path, request: pytest.FixtureRequest) -> None:
    assert "bundle" in whole_runs.FIXTURES & set(request.fixturenames)
    assert (bundle / "model.onnx").stat().st_size > 1000
