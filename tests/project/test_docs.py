"""The documentation is true to the code: commands parse, Python runs its imports, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_pages import anchors, links, pages, tokens
from transformers import PretrainedConfig

from rk_export import Recipe
from rk_export.cli.compress_arguments import asked_recipe
from rk_export.cli.parser import build_parser
from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.families.registry import architecture_of
from rk_export.recipes import presets
from rk_export.report.records import TIERS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
PAGES = pages()
DOCS = [path for path in PAGES if path.is_relative_to(ROOT / "docs") and path not in RESULTS]
GUIDES = [README, *DOCS]
INSIDE = (
    ROOT / "docs" / "explanation" / "architecture.md"
)  # shows how the library looks inside, to those who change it
PUBLIC = ("rk_export", "rk_export.runtime", "rk_export.runtime.engine", "rk_export.testing")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(
    r"(?:budget|calibration|prune|prepare|factorize|basel|cap|sslc|quantize|correct|heal): \S"
)
_INLINE_COMMAND = re.compile(r"`rk-export ([a-z]+)\b")


def _page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _blocks(path: Path, *languages: str) -> list[str]:
    found = _FENCE.findall(path.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def _commands(path: Path) -> Iterator[list[str]]:
    """Yield the words after ``rk-export`` of every command line in the shell blocks of a page."""
    for block in _blocks(path, "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["rk-export"]:
                yield words[1 : words.index(">") if ">" in words else None]


def _subparsers() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    choices = next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(choices)


def _prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def test_pages_are_there() -> None:
    names = {path.name for path in DOCS}
    assert names >= {"architecture.md", "bundle.md", "cli.md", "methods.md", "parity.md"}


@pytest.mark.parametrize("path", GUIDES, ids=_page_id)
def test_commands_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("task.txt", "math.txt", "wiki.txt", "mine.txt"):  # texts are opened when options are made
        Path(name).write_text("Some text.", encoding="utf-8")
    parser = build_parser()
    for words in _commands(path):
        try:
            args = parser.parse_args(words)
        except SystemExit:
            pytest.fail(f"does not parse: rk-export {shlex.join(words)}")
        if words[0] in ("compress", "plan", "analyze"):
            _write_recipe(args.recipe)
            asked_recipe(args)  # raises InputError where a value is impossible


def _write_recipe(name: str | None) -> None:
    """Write the recipe file that a command names: a preset, as `rk-export recipes` prints it to be edited."""
    if name is not None and name.endswith(".yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(presets()["cap"].text, encoding="utf-8")


@pytest.mark.parametrize("path", GUIDES, ids=_page_id)
def test_commands_named_in_prose_exist(path: Path) -> None:
    assert set(_INLINE_COMMAND.findall(_prose(path))) <= set(_subparsers())


@pytest.mark.parametrize("path", GUIDES, ids=_page_id)
def test_python_compiles_and_imports_public_names_only(path: Path) -> None:
    for block in _blocks(path, "python"):
        tree = ast.parse(block)
        compile(tree, str(path), "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rk_export"):
                assert node.module in PUBLIC or path == INSIDE, f"{node.module} is not public"
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert alias.name in getattr(module, "__all__", vars(module)), alias.name


def _fragments(path: Path) -> Iterator[str]:
    """Yield the parts of recipes that a page shows: whole ones in blocks, single entries between backticks."""
    for token in tokens(path):
        if (
            token.type == "fence"
            and token.info == "yaml"
            and re.search(r"^steps:", token.content, re.MULTILINE)
        ):
            yield token.content
        for child in token.children or []:
            if child.type == "code_inline" and _ENTRY.match(child.content):
                yield child.content


def _completed(fragment: str) -> Iterator[str]:
    """Yield recipes with a fragment: by itself, and with what the other parts of a recipe may have to say."""
    if "\n" in fragment:
        yield fragment
    elif fragment.startswith(("budget", "calibration")):
        yield f"{fragment}\nsteps:\n  - factorize: {{}}\n  - quantize: {{targets: all, bits: auto}}\n"
    else:
        yield f"steps:\n  - {fragment}\n"
        yield f"budget: {{keep: 0.9}}\nsteps:\n  - {fragment}\n"
        yield f"steps:\n  - quantize: {{bits: 4}}\n  - {fragment}\n"


@pytest.mark.parametrize("path", GUIDES, ids=_page_id)
def test_parts_of_recipes_are_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("task.txt", "mine.txt"):
        Path(name).write_text("Some text.", encoding="utf-8")
    for fragment in _fragments(path):
        refusals = [_refusal(Path("recipe.yaml"), text) for text in _completed(fragment)]
        assert "" in refusals, f"{fragment}: {refusals[0]}"


def _refusal(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    try:
        Recipe.load(path)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", PAGES, ids=_page_id)
def test_relative_links_lead_somewhere(path: Path) -> None:
    dead = [f"{path}:{line}: {target}" for line, target in links(path) if not _is_there(path, target)]
    assert not dead


def _is_there(path: Path, target: str) -> bool:
    """Whether a link leads to a file of the repository, and to a heading where it names one; hosts are not asked."""
    if re.match(r"[a-z]+:", target):
        return True
    page = _target(path, target)
    anchor = target.partition("#")[2]
    return page.is_file() and page.is_relative_to(ROOT) and (not anchor or anchor in anchors(page))


def _target(path: Path, target: str) -> Path:
    name = unquote(target.partition("#")[0])
    return (path.parent / name).resolve() if name else path


def test_every_page_is_reached_from_the_front_page() -> None:
    reached, ahead = set(), {README}
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead |= {target for _, link in links(page) if (target := _target(page, link)) in PAGES} - reached
    assert set(PAGES) - reached == set()


def test_family_list_equals_the_codes() -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        architecture_of(PretrainedConfig())
    known = set(re.findall(r"[\w-]+", refused.value.fix.removeprefix("use one of ")))
    section = README.read_text(encoding="utf-8").partition("## Supported families")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([\w-]+)`", "".join(rows))) == known


def test_tier_table_lists_every_tier() -> None:
    page = (ROOT / "docs" / "reference" / "parity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([0a-z]) \|", page, re.MULTILINE)
    assert rows == list(TIERS)


@pytest.mark.parametrize("path", [*GUIDES, *RESULTS], ids=_page_id)
def test_files_that_pages_name_are_there(path: Path) -> None:
    named = re.findall(
        r"`((?:rk_export|passes|runtime|tests|samples)/[\w/.]+)`", path.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
