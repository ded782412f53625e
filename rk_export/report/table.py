"""A table, built once and written as aligned text, for a terminal, as Markdown or as cells of an HTML page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rk_export.report import humanize

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Kind = Literal["text", "name", "number", "status"]
Cells = Iterable[Sequence[str]]

_GAP = 2  # spaces between columns
_PROSE_WIDTH = 12  # narrowest column of prose on a terminal
_UNBOUNDED = 100_000
_GOOD, _BAD, _MIXED = "green", "bold red", "yellow"
_COLORS = {
    **dict.fromkeys(("pass", "ok", "applied"), _GOOD),
    **dict.fromkeys(("FAIL", "missed", "extra", "refused", "PROBLEM"), _BAD),
    **dict.fromkeys(("skipped", "partly", "not measured", "notice"), _MIXED),
}


@dataclass(frozen=True)
class Column:
    """A column's heading and what its cells hold: prose, an identifier, a number or a verdict."""

    title: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """Rows of finished cells under named columns, with a title where it stands among other tables."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    def text(self) -> str:
        """Return aligned plain text, a line a row, numbers to the right."""
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=_UNBOUNDED, color_system=None).print(self.for_terminal(), crop=False)
        lines = [line.rstrip() for line in stream.getvalue().splitlines()]
        return "\n".join([self.title, *lines] if self.title else lines)

    @property
    def least_width(self) -> int:
        """Characters of a line when prose is folded as far as it may be."""
        return sum(map(self._least_width, range(len(self.columns)))) + _GAP * (len(self.columns) - 1)

    def _least_width(self, index: int) -> int:
        column = self.columns[index]
        longest = max(len(cell) for cell in (column.title, *(row[index] for row in self.rows)))
        return min(longest, _PROSE_WIDTH) if column.kind == "text" else longest

    def for_terminal(self) -> RichTable:
        """Return the rows as rich prints them: verdicts in color, prose folded where the terminal is narrow."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, show_edge=False, pad_edge=False, padding=(0, _GAP, 0, 0))
        for index, column in enumerate(self.columns):
            table.add_column(
                Text(humanize.plain(column.title), style="bold"),
                justify="right" if column.kind == "number" else "left",
                no_wrap=column.kind != "text",
                overflow="fold",
                min_width=self._least_width(index),
            )
        for row in self.rows:
            table.add_row(*(Text(humanize.plain(cell), style=_COLORS.get(cell, "")) for cell in row))
        return table

    def markdown(self) -> str:
        """Return a Markdown table; what a cell holds is never read as markup."""
        head = [column.title for column in self.columns]
        rule = ["---:" if column.kind == "number" else "---" for column in self.columns]
        body = (
            [_code(cell) if column.kind == "name" else escape_markdown(cell) for cell, column in pairs]
            for pairs in (zip(row, self.columns, strict=True) for row in self.rows)
        )
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])


Block = str | Table  # lines of text, or a table: what a command prints, an empty line apart


def plain_text(blocks: Iterable[Block]) -> str:
    """Return blocks as plain text, an empty line between them."""
    return "\n\n".join(block if isinstance(block, str) else block.text() for block in blocks)


def make_table(columns: Sequence[Column], rows: Cells, title: str = "") -> Table:
    """Return a table without the columns that no row fills."""
    cells = [tuple(row) for row in rows]
    used = [any(row[i] not in ("", humanize.ABSENT) for row in cells) for i in range(len(columns))]
    kept = tuple(column for column, keep in zip(columns, used, strict=True) if keep)
    filled = (tuple(c for c, keep in zip(row, used, strict=True) if keep) for row in cells)
    return Table(kept, tuple(filled), title)


def escape_markdown(text: str) -> str:
    """Return ``text`` so that Markdown shows it literally, on one line."""
    escaped = "".join(f"\\{character}" if character in "\\`*_[]|~#" else character for character in text)
    return humanize.plain(escaped.replace("&", "&amp;").replace("<", "&lt;"))


def _code(text: str) -> str:
    """Return a code span for a table cell; the characters that would end it are replaced."""
    span = humanize.plain(text).replace("`", "'").replace("|", "\\|")
    return f"`{span}`" if span else ""
