"""How the library is built, in figures: modules and lines, import layers, the widest module, what a method touches.

    python tests/measure_structure.py                               measures this tree, counts included
    python tests/measure_structure.py --tree OLDER --name before    another checkout, as it stands
    python tests/measure_structure.py --seconds unit=80 gate=900    notes what `time make unit` and the gate showed

Writes ``docs/results/structure.json``, one entry a tree, and ``structure.md`` from it. What one compression reads and
builds is counted by ``tests/run_counts.py``, which knows the names of this tree only.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "structure.json"
FOLDERS = {"rk_export": "rk_export", "passes": "rk_export.passes", "runtime": "rk_export.runtime"}


class Tree:
    """The library's modules of one checkout, and what they import of each other.

    Args:
        root: The checkout.
    """

    def __init__(self, root: Path) -> None:
        paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
        self.paths = {self._name(root, path): path for path in paths}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.paths.items()}

    @staticmethod
    def _name(root: Path, path: Path) -> str:
        folder, *parts = path.relative_to(root).with_suffix("").parts
        return ".".join([FOLDERS[folder], *(part for part in parts if part != "__init__")])

    @cache  # noqa: B019  a tree lives as long as the script
    def imports(self, name: str) -> frozenset[str]:
        """Return the modules of ours that a module imports, those inside functions included."""
        found: set[str] = set()
        for node in executed(self.trees[name]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & self.paths.keys()
                found |= inner or {str(node.module)}
        return frozenset(found & self.paths.keys() - {name})

    def lines(self, name: str) -> int:
        """Return the lines of a module."""
        return len(self.paths[name].read_text(encoding="utf-8").splitlines())


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without what only type checkers run."""
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from executed(child)


def folder_of(name: str) -> str:
    """Return the folder below the library that a module lies in; modules beside them stand for themselves."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def layers(graph: dict[str, set[str]]) -> int | None:
    """Return the length of the longest chain of imports; None where imports run in a circle."""
    depth: dict[str, int] = {}
    try:
        for node in TopologicalSorter(graph).static_order():
            depth[node] = 1 + max((depth[other] for other in graph.get(node, ())), default=0)
    except ValueError:
        return None
    return max(depth.values())


def longest(tree: Tree) -> list[int]:
    """Return the lines of every function, ascending."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sorted(
        node.end_lineno - node.lineno + 1
        for module in tree.trees.values()
        for node in ast.walk(module)
        if isinstance(node, functions) and node.end_lineno is not None
    )


def measure(root: Path) -> dict[str, Any]:
    """Return the figures of one checkout."""
    tree = Tree(root)
    modules = {name: set(tree.imports(name)) for name in tree.paths}
    packages: dict[str, set[str]] = {folder_of(name): set() for name in modules}
    for name, others in modules.items():
        packages[folder_of(name)] |= {folder_of(other) for other in others} - {folder_of(name)}
    lines, functions = {name: tree.lines(name) for name in modules}, longest(tree)
    widest = max(modules, key=lambda name: len(modules[name]))
    return {
        "commit": _git(root, "rev-parse", "--short", "HEAD"),
        "modules": len(modules),
        "lines": sum(lines.values()),
        "lines of a module, median and largest": [median(lines.values()), max(lines.values())],
        "lines of a function, median and largest": [median(functions), functions[-1]],
        "modules by folder": dict(sorted(Counter(_home(tree, name) for name in modules).items())),
        "import layers of modules": layers(modules),
        "import layers of folders": layers(packages),
        "widest module": [widest.removeprefix("rk_export."), len(modules[widest])],
        "modules that name a method": method_files(tree),
    }


def _home(tree: Tree, name: str) -> str:
    """Return the folder at the top that a module lies in; a module beside the folders lies in the library itself."""
    return "rk_export itself" if tree.paths[name].parent.name == "rk_export" else folder_of(name)


def method_files(tree: Tree) -> int:
    """Return how many modules outside the methods' own say basel or cap in their code: what a new method touches."""
    own = ("rk_export.methods.", "rk_export.basis_", "rk_export.cap", "rk_export.passes.numerics")
    words = {"basel", "cap"}
    return sum(
        bool(words & set(_words(module)))
        for name, module in tree.trees.items()
        if not name.startswith(own) and name != "rk_export.methods"
    )


def _words(module: ast.Module) -> set[str]:
    fields = ("id", "attr", "arg")
    named = {getattr(node, field, None) for node in ast.walk(module) for field in fields}
    said = {node.value for node in ast.walk(module) if isinstance(node, ast.Constant)}
    return {word for word in named | {text for text in said if isinstance(text, str)} if word}


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def page(found: dict[str, Any]) -> str:
    """Return the page of the results."""
    before, after = found["before"], found["after"]
    rows = [
        *_same(before, after, "modules", "lines"),
        *((f"modules in {name}", *_in_folder(before, after, name)) for name in _folders(before, after)),
        *_same(before, after, "import layers of folders", "import layers of modules"),
        ("widest module: its imports of ours", _widest(before), _widest(after)),
        *_sizes(before, after, "module"),
        *_sizes(before, after, "function"),
        ("modules outside methods that name one", before[NAMING], after[NAMING]),
        *_times(found),
    ]
    head = HEAD.format(before=before["commit"], after=after["commit"])
    counts = _counts(found["counts"])
    return "\n".join([head, *_table(("", "before", "after"), rows), "", COUNTED, *counts, "", METHOD])


NAMING = "modules that name a method"
HEAD = """# Structure

This page counts what the library is made of. *Before* is commit {before}, with one folder of modules. *After* is the
packages of [architecture.md](../explanation/architecture.md), measured at {after}. Lines include docstrings.

Made by `python tests/measure_structure.py`. The same as data: [structure.json](structure.json).
"""
COUNTED = """## What one compression reads and builds

`python tests/run_counts.py` counts one `compress` of a Llama with two layers and 21 tensors, without a cache. *Before*
was counted by the same counters on the names of that commit. The reads of transformers for tier 0 are left out.

With a cache, the counts of *after* are the same. No file is hashed and no whole model is kept. Only the pruned run
keeps one, for tier a.
"""
METHOD = """## What a method touches

How much code does a new method need? SSLC (arXiv 2510.26446) was added to the packages as they stand. It took:

- one folder, `rk_export/methods/sslc/`, with four files,
- its numerics in `passes/numerics/sslc.py`,
- one line and its import in `rk_export/methods/__init__.py`,
- the package's line in `pyproject.toml`,
- two test files,
- a word each in two tests that list public classes and methods,
- a paragraph in `docs/explanation/methods.md` and three lines in `docs/reference/cli.md`.

The step `sslc` of recipes, its help, the plan's JSON, `rk_export.SslcOptions`, report and model card followed by
themselves. Before, twelve modules outside the methods' own named `basel` or `cap`.

[cap.md](cap.md) compares SSLC with Wanda and CAP.
"""


def _same(before: dict[str, Any], after: dict[str, Any], *names: str) -> list[tuple[str, Any, Any]]:
    return [(name, before[name], after[name]) for name in names]


def _sizes(before: dict[str, Any], after: dict[str, Any], what: str) -> list[tuple[str, Any, Any]]:
    """Return the rows of median and largest lines of a module or a function."""
    sizes = [tree[f"lines of a {what}, median and largest"] for tree in (before, after)]
    return [
        (f"{name} {what}, lines", *(size[at] for size in sizes))
        for at, name in enumerate(("median", "largest"))
    ]


def _in_folder(before: dict[str, Any], after: dict[str, Any], name: str) -> tuple[int, int]:
    return before["modules by folder"].get(name, 0), after["modules by folder"].get(name, 0)


def _folders(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(
        {**before["modules by folder"], **after["modules by folder"]}, key=lambda name: name.lower()
    )


def _widest(tree: dict[str, Any]) -> str:
    name, imports = tree["widest module"]
    return f"{imports} (`{name}`)"


def _times(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    named = {"unit": "`make unit`, seconds", "gate": "the gate on a clean clone, seconds"}
    return [
        (named[name], found["before"].get("seconds", {}).get(name, "–"), found["after"]["seconds"][name])
        for name in named
        if name in found["after"].get("seconds", {})
    ]


def _counts(counts: dict[str, Any]) -> list[str]:
    runs = list(counts["after"])
    names = [name for name in counts["before"][runs[0]] if name != "tensors"]
    rows = [
        (name, *(f"{counts['before'][run][name]} → {counts['after'][run].get(name, 0)}" for run in runs))
        for name in names
    ]
    return _table(("", *runs), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def main() -> int:
    """Measure one tree and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout (default: this one)")
    parser.add_argument("--name", default="after", help="name of its entry (default after)")
    parser.add_argument(
        "--seconds", nargs="+", default=[], metavar="NAME=SECONDS", help="times to note with it"
    )
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    entry = found.setdefault(args.name, {})
    if args.seconds:
        entry.setdefault("seconds", {}).update(
            (name, int(value)) for name, _, value in (one.partition("=") for one in args.seconds)
        )
    else:
        entry |= measure(args.tree)
    if args.tree == ROOT and not args.seconds:
        from run_counts import measured

        counts = {run: both["empty"] for run, both in measured().items()}
        found.setdefault("counts", {})[args.name] = counts
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if {"before", "after", "counts"} <= found.keys():
        RESULTS.with_suffix(".md").write_text(page(found), encoding="utf-8")
    json.dump(entry, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
