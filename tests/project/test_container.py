"""The image's files agree with the package, the server's imports and the manifests; no container engine is needed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rk_export.bundle.targets import pods

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "samples" / "container"
# tokenizers calls it to download only.
LEFT_OUT = {"huggingface-hub"}
RUNTIMES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
IMPORTS = """
import importlib, json, pkgutil, sys

before = set(sys.modules)


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
import rk_export.cli.main
import rk_export.cli.parser
import rk_export.runtime

rk_export.cli.parser.build_parser()
for module in pkgutil.walk_packages(rk_export.runtime.__path__, "rk_export.runtime."):
    importlib.import_module(module.name)
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


def project() -> Any:
    """Return what the package declares; the metadata of an editable installation may be older."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned(name: str) -> dict[str, str]:
    """Return the packages of a requirements file by name, those of the files that it includes too."""
    found: dict[str, str] = {}
    for line in (PLACE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= pinned(line.split()[1])
        elif line and not line.startswith("#"):
            package, version = line.split("==")
            assert package not in found
            found[package] = version
    return found


def lists() -> tuple[set[str], set[str]]:
    """Return the packages that the server needs itself, and those that these need."""
    text = (PLACE / "requirements.txt").read_text(encoding="utf-8")
    own, others = (
        {line.split("==")[0] for line in part.splitlines() if "==" in line} for part in text.split("\n\n")
    )
    return own, others


def needed(package: str) -> set[str]:
    """Return what the metadata of an installed package ask for on Linux with Python 3.12."""
    machine = {
        "python_version": "3.12",
        "python_full_version": "3.12.0",
        "sys_platform": "linux",
        "extra": "",
    }
    wanted = [Requirement(text) for text in metadata.requires(package) or []]
    return {
        canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate(machine)
    }


def run_imports(packages: set[str]) -> subprocess.CompletedProcess[str]:
    """Import the command line and every module of the runtime where only some packages can be found."""
    known = {"rk-export", *packages}
    owners = metadata.packages_distributions()
    blocked = {
        module for module, names in owners.items() if not known & {canonicalize_name(name) for name in names}
    }
    code = IMPORTS.format(blocked=blocked)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """Packages that are imported where those of the image can be found."""
    done = run_imports({*pinned("requirements.txt"), *RUNTIMES.values()})
    assert done.returncode == 0, done.stderr
    owners = metadata.packages_distributions()
    modules = json.loads(done.stdout)
    return {canonicalize_name(owners[name][0]) for name in modules if name in owners} - {"rk-export"}


def test_the_server_imports_what_the_image_has_and_no_less(imported: set[str]) -> None:
    assert {"numpy", "tokenizers"} <= imported
    done = run_imports({*pinned("requirements.txt"), *RUNTIMES.values()} - {"jinja2"})
    assert done.returncode != 0
    assert "No module named 'jinja2'" in done.stderr


def test_nothing_is_in_the_image_that_the_server_does_not_need(imported: set[str]) -> None:
    own, others = lists()
    serve = {Requirement(text).name for text in project()["optional-dependencies"]["serve"]}
    assert serve <= own <= imported | serve
    asked = set().union(*(needed(package) for package in own | others | {"onnxruntime-gpu"}))
    assert others <= asked
    assert asked - own - others == LEFT_OUT


@pytest.mark.parametrize(("kind", "runtime"), RUNTIMES.items())
def test_one_onnx_runtime_and_versions_that_the_package_allows(kind: str, runtime: str) -> None:
    found = pinned(f"requirements-{kind}.txt")
    assert {name for name in found if name.startswith("onnxruntime")} == {runtime}
    texts = (*project()["dependencies"], *project()["optional-dependencies"]["serve"])
    allowed = [Requirement(text) for text in texts]
    checked = [one for one in allowed if one.name in found]
    assert len(checked) > 5
    assert not [str(one) for one in checked if not one.specifier.contains(found[one.name])]


def instructions() -> list[list[str]]:
    """Return the lines of the Containerfile, continued ones as one, in words."""
    text = (PLACE / "Containerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line]


def test_the_image_is_built_from_what_makes_the_wheel() -> None:
    copied = {
        word
        for line in instructions()
        if line[0] == "COPY" and "--from" not in line[1]
        for word in line[1:-1]
    }
    sources = {"pyproject.toml", "README.md", "LICENSE", "rk_export", "passes", "runtime", "optimum_commands"}
    assert copied == sources | {"samples/container/requirements*.txt"}
    kept = (PLACE / "Containerfile.dockerignore").read_text(encoding="utf-8").split()
    assert sources <= {line[1:] for line in kept if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sources)


def test_the_image_runs_as_the_manifests_expect() -> None:
    final = instructions()
    final = final[max(index for index, line in enumerate(final) if line[0] == "FROM") :]
    by_name = {line[0]: line[1:] for line in final}
    assert by_name["USER"] == [f"{pods.USER}:{pods.USER}"]
    assert by_name["EXPOSE"] == [str(pods.PORT)]
    assert f"http://127.0.0.1:{pods.PORT}/health/live" in " ".join(by_name["HEALTHCHECK"])
    assert by_name["ENTRYPOINT"] == [
        "[/opt/rk-export/bin/rk-export]"
    ]  # no shell, so the server gets the signals
    assert by_name["CMD"] == ["[serve,", "/bundle,", "--host=0.0.0.0]"]
    assert "RUN" not in by_name
