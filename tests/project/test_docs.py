"""The documentation is true to the code: commands parse, Python runs its imports, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PretrainedConfig

from rk_export.cli.compress_arguments import compress_options
from rk_export.cli.parser import build_parser
from rk_export.errors import UnsupportedModelError
from rk_export.model.families import architecture_of
from rk_export.report.records import TIERS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
DOCS = sorted(set((ROOT / "docs").rglob("*.md")) - set(RESULTS))
PAGES = [README, ROOT / "CHANGELOG.md", *DOCS, *RESULTS]
GUIDES = [README, *DOCS]
INSIDE = (
    ROOT / "docs" / "explanation" / "architecture.md"
)  # shows how the library looks inside, to those who change it
PUBLIC = ("rk_export", "rk_export.runtime", "rk_export.testing")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_INLINE_COMMAND = re.compile(r"`rk-export ([a-z]+)\b")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


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
                yield words[1:]


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
            compress_options(args)  # raises InputError where a value is impossible


def test_readme_shows_every_command() -> None:
    assert {words[0] for words in _commands(README)} == set(_subparsers())


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


@pytest.mark.parametrize("path", PAGES, ids=_page_id)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in _LINK.findall(_prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{target} is not there"
        if anchor:
            headings = _HEADING.findall(_prose(page))
            assert anchor in {_slug(heading) for heading in headings}, f"{target}: no such heading"


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


COMMON = {"--json", "--quiet"}


def test_option_list_is_complete() -> None:
    """Each section of cli.md lists exactly the options of its command, beside those that every command takes."""
    sections = re.split(
        r"^## ", (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    by_command = {section.partition("\n")[0].strip(): section for section in sections}
    for name, parser in _subparsers().items():
        rows = [line for line in by_command[name].splitlines() if line.startswith("| `-")]
        documented = {option for row in rows for option in _OPTION.findall(row.split("|")[1])}
        options = {option for action in parser._actions for option in action.option_strings}
        assert documented | COMMON == options - {"-h", "--help"}, name


def test_family_list_equals_the_codes() -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        architecture_of(PretrainedConfig())
    known = set(re.findall(r"\w+", refused.value.fix.removeprefix("use one of ")))
    section = README.read_text(encoding="utf-8").partition("## Supported families")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == known


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "reference" / "parity.md"], ids=_page_id)
def test_tier_table_lists_every_tier(path: Path) -> None:
    rows = re.findall(r"^\| ([0a-z]) \|", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(TIERS)


@pytest.mark.parametrize("path", [*GUIDES, *RESULTS], ids=_page_id)
def test_files_that_pages_name_are_there(path: Path) -> None:
    named = re.findall(
        r"`((?:rk_export|passes|runtime|tests|samples)/[\w/.]+)`", path.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
