"""The presets and the fields of recipes as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rk_export.recipes.fields import SectionHelp
from rk_export.recipes.presets import About
from rk_export.report.table import Column, Table, make_table


def presets_table(presets: Mapping[str, About]) -> Table:
    """Return one row for each preset: its name, what it does, when to take it, and the paper."""
    columns = (
        Column("recipe", "name"),
        Column("what it does"),
        Column("when to take it"),
        Column("arXiv", "name"),
    )
    rows = [(name, about.does, about.when, about.paper or "") for name, about in presets.items()]
    return make_table(columns, rows)


def fields_tables(sections: Iterable[SectionHelp]) -> tuple[Table, ...]:
    """Return a table of fields for each step and each other section of a recipe."""
    columns = (Column("field", "name"), Column("default", "name"), Column("meaning"))
    return tuple(
        Table(
            columns,
            tuple((one.name, one.default, one.help) for one in section.fields),
            f"{section.name}: {section.help}",
        )
        for section in sections
    )
