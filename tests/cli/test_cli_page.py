"""The reference page of the command line is what the parser says, and its examples can be typed."""

from __future__ import annotations

import os
import shlex

import pytest
from cli_page import PAGE, commands, page

from rk_export.cli.examples import EXAMPLES
from rk_export.cli.parser import build_parser

NAMES = [name for name, _, _ in commands(build_parser())]


def test_the_page_is_written_from_the_parser() -> None:
    if os.environ.get("RK_UPDATE_DOCS"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", NAMES)
def test_every_example_can_be_typed(name: str) -> None:
    for typed, _ in EXAMPLES[name]:
        args = build_parser().parse_args(shlex.split(typed))
        assert args.run.__name__ == f"run_{name}"


def test_every_argument_has_a_meaning() -> None:
    for name, parser, _ in commands(build_parser()):
        for action in parser._actions:
            assert action.help, f"{name}: {action.dest}"
