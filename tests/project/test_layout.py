"""The layout that the build and the readers rely on: packages, import directions, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from rk_export.methods import METHODS

ROOT = Path(__file__).parents[2]
MAPPED = {
    "rk_export": ROOT / "rk_export",
    "rk_export.passes": ROOT / "passes",
    "rk_export.runtime": ROOT / "runtime",
}
REGISTER = "optimum.commands.register"

# Packages and single modules in the order in which data flows: each imports itself and what stands before it.
ORDER = (
    *(
        "errors",
        "progress",
        "atomic",
        "half_written",
        "json_codec",
        "inside",
        "manifest",
        "signature",
        "memory",
        "device",
        "report",
        "runtime",
        "text",
        "options",
        "matrix_id",
        "plan",
        "folders",
        "cache_limit",
        "tensor_cache",
        "scratch",
        "work_folder",
    ),
    *(
        "passes",
        "model",
        "source",
        "calibration",
        "planning",
        "training",
        "rewrite",
        "methods",
        "recipes",
        "graph",
    ),
    *("evaluation", "parity", "bundle", "commands", "testing", "cli"),
)
FRONT_DOORS = {"rk_export", "rk_export.testing"}  # may use the commands
TEXT = {".cfg", ".html", ".ini", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w")


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = [part for part in relative.parts if part != "__init__"]
    return ".".join(parts if parts[0] == "rk_export" else ["rk_export", *parts])


@cache
def _modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of ours, by the name it is imported under."""
    paths = _sources("rk_export", "passes", "runtime")
    return {_module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without what only type checkers run."""
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)


def _imported(tree: ast.AST) -> set[str]:
    """Return the dotted names that a module imports, those inside functions included."""
    names: set[str] = set()
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & _modules().keys()
            names |= submodules or {str(node.module)}
    return names


def _own_imports(name: str) -> set[str]:
    return _imported(_modules()[name]) & _modules().keys()


def _pyproject() -> Any:
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_packages_are_those_on_disk() -> None:
    found = {
        _module_name(path)
        for path in _sources("rk_export", "passes", "runtime")
        if path.name == "__init__.py"
    }
    declared = _pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted({*found, REGISTER})


def test_mapped_folders_exist_and_leave_optimums_namespace_open() -> None:
    folders = _pyproject()["tool"]["setuptools"]["package-dir"]
    expected = {name: path.name for name, path in MAPPED.items() if name != "rk_export"}
    assert folders == {**expected, REGISTER: "optimum_commands"}
    assert not list((ROOT / "optimum_commands").rglob("__init__.py"))


def test_imports_are_absolute_and_through_rk_export() -> None:
    for path in _sources("rk_export", "passes", "runtime", "optimum_commands", "tests", "samples"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"passes", "runtime"}, f"{path}:{node.lineno}: a second copy of every class"


def _place(name: str) -> int | None:
    part = name.split(".")[1] if "." in name else ""
    return ORDER.index(part) if part in ORDER else None


def test_packages_import_what_stands_before_them() -> None:
    against = [
        f"{name} -> {other}"
        for name in _modules()
        for other in _own_imports(name)
        if (here := _place(name)) is not None and (there := _place(other)) is not None and here < there
    ]
    assert not against


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("rk_export.passes", {"errors", "report", "options", "matrix_id", "plan"}),
        ("rk_export.runtime", {"errors", "inside", "json_codec", "manifest", "memory", "progress", "report"}),
    ],
)
def test_lower_packages_import_themselves_and_leaves(package: str, others: set[str]) -> None:
    inside = {name for name in _modules() if name == package or name.startswith(f"{package}.")}
    assert inside
    outside = {other for name in inside for other in _own_imports(name) - inside}
    assert {other.split(".")[1] for other in outside} <= others


def test_only_the_dense_graph_imports_mobius() -> None:
    users = {
        name for name, tree in _modules().items() if any("mobius" in n.split(".") for n in _imported(tree))
    }
    assert {name.rpartition(".")[0] for name in users} == {"rk_export.graph.dense"}


def test_only_front_doors_import_commands() -> None:
    inside = ("rk_export.commands.", "rk_export.cli.")
    users = {
        name
        for name in _modules()
        if not name.startswith(inside) and any(other.startswith(inside) for other in _own_imports(name))
    }
    assert users <= FRONT_DOORS


# Methods that other papers have too, and words that mean something else elsewhere.
COMMON_WORDS = {"prune", "heal"}


def _method_words() -> dict[str, str]:
    """Return every method's name, as it may stand in code, and its folder."""
    words = {kind.name: kind.__module__.split(".")[2] for kind in METHODS}
    return {name: folder for name, folder in words.items() if name not in COMMON_WORDS}


def _names_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names and the strings of a module, with their lines; prose in docstrings is left out."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value, node.lineno
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(found := getattr(node, field, None), str):
                yield found, getattr(node, "lineno", 0)


@pytest.mark.parametrize("method", sorted(_method_words()))
def test_a_method_is_named_in_its_folder_and_where_methods_are_listed(method: str) -> None:
    """Adding a method touches its folder and one list: nothing else asks which method it is."""
    folder = _method_words()[method]
    word = re.compile(rf"(?<![a-z]){method.replace('-', '[-_]')}(?![a-z])", re.IGNORECASE)
    allowed = (f"rk_export.methods.{folder}", "rk_export.methods")
    found = {
        f"{name}:{line}"
        for name, tree in _modules().items()
        if name not in allowed and not name.startswith(f"{allowed[0]}.")
        for text, line in _names_of(tree)
        if word.search(text)
    }
    assert not found


def test_imports_form_no_cycle() -> None:
    assert list(TopologicalSorter({name: _own_imports(name) for name in _modules()}).static_order())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        (
            "import rk_export, rk_export.runtime, rk_export.cli.main",
            {"torch", "transformers", "onnx", "onnxruntime", "pydantic"},
        ),
        ("from rk_export.runtime import Session, bench", {"torch", "transformers", "rk_export.passes"}),
    ],
)
def test_import_stays_light(statement: str, forbidden: set[str]) -> None:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & forbidden


def test_no_file_names_a_path_of_some_machine() -> None:
    folders = ("rk_export", "passes", "runtime", "optimum_commands", "tests", "samples", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    texts = (path for path in paths if path.is_file() and (path.suffix in TEXT or path.name == "Makefile"))
    assert not [str(path) for path in texts if MACHINE_PATH.search(path.read_text(encoding="utf-8"))]
