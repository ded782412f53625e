"""ONNX Runtime and GenAI record nothing about the machine, however rk-export is started, unless the user wants it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
GENAI = importlib.util.find_spec("onnxruntime_genai") is not None
RUNTIME_IMPORT = re.compile(
    r"^(import|from) (onnxruntime|onnxruntime_genai|optimum\.onnxruntime)\b", re.MULTILINE
)


def opening(bundle: Path) -> str:
    return f"from rk_export.runtime import Session; Session.from_pretrained({str(bundle)!r}, provider='cpu')"


def generating(bundle: Path) -> str:
    return f"{opening(bundle)}.generate('the')"


def command(*words: object) -> str:
    return (
        f"import sys; from rk_export.cli.main import main; sys.exit(main({[str(word) for word in words]!r}))"
    )


def running(bundle: Path) -> str:
    return command("run", bundle, "-p", "the", "--max-new-tokens", 2, "--provider", "cpu")


def probing(_: Path) -> str:
    """What `rk-export doctor` does, in a process of its own."""
    return (
        "from rk_export.commands.environment_probes import try_out; assert try_out('cpu').facts['providers']"
    )


def sample(name: str, bundle: Path) -> str:
    words = [name, str(bundle), "-p", "the", "--max-new-tokens", "2"]
    run = f"runpy.run_path('samples/{name}.py', run_name='__main__')"
    return f"import runpy, sys; sys.argv = {words!r}; {run}"


def deploying(bundle: Path) -> str:
    return sample("deploy_onnxruntime", bundle)


def files_after(code: str, home: Path, **variables: str) -> list[Path]:
    """Run Python code as a user with an empty home would; return the files that it left there."""
    inherited: Mapping[str, str] = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **places, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.whole
@pytest.mark.parametrize("code", [generating, running, probing, deploying], ids=lambda code: code.__name__)
def test_nothing_is_recorded(code: Callable[[Path], str], bundle: Path, tmp_path: Path) -> None:
    assert files_after(code(bundle), tmp_path / "home") == []


@pytest.mark.whole
@pytest.mark.skipif(not GENAI, reason="needs the extra: pip install 'rk-export[genai]'")
def test_genai_records_nothing_either(bundle: Path, tmp_path: Path) -> None:
    speeds = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)
    bench = command("bench", bundle, "--against", f"genai:{bundle}", "--provider", "cpu", *speeds)
    assert files_after(bench, tmp_path / "bench") == []
    assert files_after(sample("deploy_genai", bundle), tmp_path / "sample") == []


@pytest.mark.whole
def test_a_user_who_wants_it_gets_it(bundle: Path, tmp_path: Path) -> None:
    found = files_after(opening(bundle), tmp_path / "home", ORT_DISABLE_TELEMETRY="0")
    if not found:
        pytest.skip("this build of ONNX Runtime records nothing")
    assert any("onnxruntime" in str(path) for path in found)


def test_the_variables_of_the_user_stay(tmp_path: Path) -> None:
    code = f"import os, rk_export; print(*(os.environ[name] for name in {VARIABLES!r}))"
    for given, expected in (({}, "1 1"), (dict.fromkeys(VARIABLES, "0"), "0 0")):
        inherited = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**inherited, **given},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == expected.split()


def test_programs_set_the_variable_before_they_import_a_runtime() -> None:
    """Modules of the package need nothing: importing the package comes first."""
    paths = [*(ROOT / "samples").rglob("*.py"), *(ROOT / "tests" / "optimum_env").glob("*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    users = {name: text for name, text in texts.items() if RUNTIME_IMPORT.search(text)}
    assert {"deploy_onnxruntime.py", "deploy_genai.py"} <= users.keys()
    for name, text in users.items():
        before = text[: next(RUNTIME_IMPORT.finditer(text)).start()]
        assert 'os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")' in before, name


@pytest.mark.parametrize("file", ["Makefile", ".ci/run"])
def test_make_and_continuous_integration_set_it(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(r"^export .*ORT_DISABLE_TELEMETRY", text, re.MULTILINE)
