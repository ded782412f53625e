"""Writes the commands' part of docs/reference/cli.md from the parser, its help texts and the examples."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rk_export.cli.examples import EXAMPLES
from rk_export.cli.parser import build_parser

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
MARK = "<!-- From here on the page is written by RK_UPDATE_DOCS=1 pytest tests/cli/test_cli_page.py -->"

# What a reader needs beyond the options.
_NOTES = {
    "compress": """
No bundle is left if parity fails. All recipes: [recipes.md](recipes.md). How a budget
is spent: [planning.md](../explanation/planning.md). Quality and speed are measured by
[eval](#eval) and [bench](#bench).
""",
    "plan": """
A plan is JSON with one entry for each matrix or group: members, form, rank, bits. `compress --plan` applies
it.
""",
    "prepare": """
Some checkpoints were quantized before, so their weights lie on a grid already, and every quantizer looks
perfect on them. This command writes an equivalent model off the grid, on which quantizers can be compared.
""",
    "verify": """
The exit code is 1 if a tier is out of its bound. The tiers: [parity.md](parity.md). The signature comes first, then
every checksum, then the tiers.
""",
    "sign": """
Every checksum is compared before the manifest is signed. How to make a key:
[deploy.md](../how-to/deploy.md#sign-a-bundle).
""",
    "eval": """
Dense models and checkpoints run in PyTorch, bundles in ONNX Runtime. Each value has its standard error. How
each is measured: [evaluation.md](evaluation.md).
""",
    "run": """
The text appears as it comes. A chat remembers what was said. Ctrl-C stops an answer and keeps what came of
it. At an empty prompt it leaves, as Ctrl-D and `/exit` do. `/reset` forgets the conversation. If the
context is full, the oldest turns are forgotten, and a line says so. Through a pipe every line is a message.

A text ends at every token that the bundle names as an end ([where texts end](bundle.md#where-texts-end)),
and where `--stop` or `--stop-token-id` say. Scores pass the same steps in the same order as in `generate`
of transformers: repetition penalty, temperature, top-k, top-p, min-p.
""",
    "bench": """
The contestants run in turns, in a batch of one, on random tokens. The result is medians, and ratios to the
first bundle. Prompt, new tokens and one more must fit into the context of every contestant.
""",
    "compare": """
With `--text` every model meets the same windows. The difference to the first model then has its own, smaller standard
error. Dense models and checkpoints may be named too. Only bundles are timed.
""",
    "report": """
The command works on a bundle, and on a folder of spectra that `analyze` wrote.
""",
    "bundle": """
Every checksum is compared first. The manifest lists the new files, so `verify` checks them too.
`kserve-triton` brings `triton` along.
""",
    "explain": """
Matrices that were left alone are listed with the reason.
""",
    "cache": """
Entries that were not used for the longest time go first: [manage the cache](../how-to/manage-the-cache.md).
""",
    "doctor": """
The exit code is 1 if export or inference on a CPU cannot work.
""",
}


def page() -> str:
    """Return the whole page: what stands above the mark, and a section for each command."""
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0].rstrip()
    sections = [_section(name, parser, summary) for name, parser, summary in commands(build_parser())]
    return "\n\n".join([head, MARK, *sections]) + "\n"


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Yield every command with its parser and summary."""
    action: Any = next(item for item in parser._actions if isinstance(item, argparse._SubParsersAction))
    summaries = {item.dest: item.help for item in action._choices_actions}
    for name, command in action.choices.items():
        yield name, command, summaries[name]


def _section(name: str, parser: argparse.ArgumentParser, summary: str) -> str:
    width = max(len(typed) for typed, _ in EXAMPLES[name])
    lines = (f"rk-export {typed:<{width}}  # {meaning}" for typed, meaning in EXAMPLES[name])
    parts = [f"## {name}", f"{summary[0].upper()}{summary[1:]}.", "```bash\n" + "\n".join(lines) + "\n```"]
    if name in _NOTES:
        parts.append(_NOTES[name].strip())
    options = [_row(action) for action in parser._actions if action.dest != "help"]
    return "\n\n".join([*parts, "\n".join(["| argument | meaning |", "| --- | --- |", *options])])


def _row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    said = (action.help or "").replace("|", r"\|") % vars(action)
    return f"| {names} | {said} |"
