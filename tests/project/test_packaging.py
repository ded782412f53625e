"""What the build puts into the wheel, and the command that it registers with Optimum."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from rk_export.cli.parser import add_compress_arguments, add_output_arguments

ROOT = Path(__file__).parents[2]
TREES = {"rk_export": "rk_export", "passes": "rk_export/passes", "runtime": "rk_export/runtime"}
COMMAND = "optimum/commands/register/rk_onnx.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: the backend writes next to the sources."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in (*TREES, "optimum_commands"):
        shutil.copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def _on_disk() -> set[str]:
    """Return what the wheel should hold: every file of our trees, under the name that it is imported by."""
    names = {COMMAND}
    for folder, target in TREES.items():
        files = (
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        names |= {f"{target}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    return names


def test_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    assert _names(wheel) == _on_disk()


def test_optimum_finds_the_command_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.commands")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands as load\n"
        "import inspect\n"
        "print(*(f'{c.COMMAND.name} {p.COMMAND.name} {inspect.getfile(c)}' for c, p in load()), sep='\\n')"
    )
    # -S keeps the import hooks of an editable installation out; the wheel comes before anything installed.
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry.endswith("-packages"))])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"rk-onnx export {tmp_path / COMMAND}" in done.stdout.splitlines()


@pytest.fixture
def command() -> Any:
    pytest.importorskip("optimum.commands")
    spec = importlib.util.spec_from_file_location("rk_onnx", ROOT / "optimum_commands" / "rk_onnx.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _options(parser: ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_command_takes_the_options_of_compress(command: Any) -> None:
    ours, theirs = ArgumentParser(), ArgumentParser()
    add_compress_arguments(ours)
    add_output_arguments(ours)
    command.RkOnnxExportCommand.parse_args(theirs)
    assert _options(theirs) - {"-m", "--model"} == _options(ours) - {"-o", "--output"}


def test_command_hands_its_arguments_to_compress(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(command, "run_compress", lambda args: seen.append(args) or 7)
    subparsers = ArgumentParser().add_subparsers()
    parser = command.RkOnnxExportCommand(subparsers).parser
    args = parser.parse_args(["--model", "org/name", "out", "--recipe", "int8"])
    with pytest.raises(SystemExit) as stop:
        args.func(args).run()
    assert stop.value.code == 7
    assert (seen[0].model, seen[0].output, seen[0].recipe) == ("org/name", Path("out"), "int8")


def test_command_turns_our_errors_into_a_message(
    command: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = command.RkOnnxExportCommand(ArgumentParser().add_subparsers()).parser
    args = parser.parse_args(["--model", str(tmp_path / "absent"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        args.func(args).run()
    assert stop.value.code == 2
    assert "absent" in capsys.readouterr().err
