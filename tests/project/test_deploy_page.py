"""Each command of deploy.md's table is in the test or the make target that the table names beside it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_pages import anchors

from rk_export.bundle.targets import TARGETS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "deploy.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
HEADER = "| server | take it when | command | run by |"


@dataclass(frozen=True)
class Row:
    """A row of the table: where it leads to, its command, and what runs the command."""

    link: str
    command: str
    runner: str

    def leads_somewhere(self) -> bool:
        """Whether the link leads to a page, and to a heading of it where it names one."""
        page, _, heading = self.link.partition("#")
        path = PAGE.parent / page if page else PAGE
        return path.is_file() and (not heading or heading in anchors(path))


def rows() -> list[Row]:
    lines = PAGE.read_text(encoding="utf-8").partition(HEADER)[2].lstrip("\n").splitlines()[1:]
    table = lines[: lines.index("")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return [
        Row(server.partition("](")[2].rstrip(")"), command.strip("`"), runner)
        for server, _, command, runner in cells
    ]


def essence(command: str) -> list[str]:
    """Return what a test of a command has to name: a sample, a deployment target, a subcommand, an application."""
    words = shlex.split(command)
    if words[0] == "python":
        return [Path(words[1]).stem]
    if "--for" in words:
        return [words[words.index("--for") + 1]]
    return [word.partition(":")[0] for word in words[1:2] if words[0] == "rk-export"] or [
        words[2].partition(":")[0]
    ]


def files_behind(runner: str) -> list[Path]:
    """Return the files of tests behind a link or a make target."""
    link = re.fullmatch(r"\[(.+)\]\((.+)\)", runner)
    if link:
        path = (PAGE.parent / link[2]).resolve()
        assert path.name == link[1]
        return [path]
    target = runner.strip("`").removeprefix("make ")
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe, f"no target {target}"
    places = [ROOT / name for name in re.findall(r"(?<![=\w])tests/[\w./]+", recipe[1])]
    return [path for place in places for path in ([place] if place.is_file() else sorted(place.glob("*.py")))]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.command)
def test_a_test_runs_the_command(row: Row) -> None:
    assert row.leads_somewhere()
    files = files_behind(row.runner)
    assert any(path.name.startswith("test_") for path in files)
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for name in essence(row.command):
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), f"no test names {name}"


def test_every_deployment_target_and_sample_has_its_row() -> None:
    """What is added to a server's files or to the samples cannot be left out of the table."""
    commands = [row.command for row in rows()]
    named = {name for command in commands for name in essence(command)}
    samples = {path.stem for path in (ROOT / "samples").glob("deploy_*.py")}
    assert samples <= named
    assert {target.name for target in TARGETS} - {"kserve-triton"} <= named  # in the section of KServe
    assert len(commands) == len(set(zip(commands, (row.runner for row in rows()), strict=True)))
