"""HTML pages: cards, sections, inline plots and the meaning of each number, in one file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from rk_export.report import humanize, plots
from rk_export.report.definitions import definition_of, definitions_of, row_label
from rk_export.report.matrix_groups import matrix_groups
from rk_export.report.records import Report
from rk_export.report.sections import Section, outcomes, sections
from rk_export.report.svg import data_uri

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Card:
    """One number at the head of the page."""

    label: str
    value: str
    detail: str = ""
    status: str = ""


@dataclass(frozen=True)
class Drawing:
    """A plot as the address of its image, with the sentence under it."""

    image: str
    caption: str


@dataclass(frozen=True)
class Page:
    """What a page shows, from its head to the definitions at its foot.

    Args:
        title: What the browser's tab says.
        heading: The first line.
        subtitle: The line below it.
        sections: The parts, with their tables.
        drawings: Plots by the anchor of their section.
        cards: Numbers at the head.
        warnings: What went badly.
        notices: What the reader must know.
    """

    title: str
    heading: str
    subtitle: str
    sections: Sequence[Section]
    drawings: Mapping[str, Sequence[Drawing]]
    cards: Sequence[Card] = ()
    warnings: Sequence[str] = ()
    notices: Sequence[str] = ()

    def html(self) -> str:
        """Return the page; every name and reason is escaped, and every number leads to its definition."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("rk_export.report"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.globals |= {"definition_of": definition_of, "row_label": row_label}
        tables = [section.table for section in self.sections if section.table is not None]
        definitions = definitions_of(tables, [card.label for card in self.cards])
        page = environment.get_template(TEMPLATE)
        return page.render(**vars(self), definitions=definitions)


def html(report: Report) -> str:
    """Return the page of a report."""
    return Page(
        f"{report.model} – rk-export report",
        report.model,
        " · ".join(filter(None, (report.model_type, report.created))),
        sections(report),
        _drawings(report),
        _cards(report),
        report.warnings,
        report.notices,
    ).html()


def _cards(report: Report) -> list[Card]:
    cards = [*_size_cards(report), *_verdict_cards(report)]
    if report.findings:
        cards.append(Card("matrix groups", str(len(matrix_groups(report.findings))), outcomes(report)))
    return cards


def _size_cards(report: Report) -> list[Card]:
    if (size := report.size) is None:
        return []
    counts = f"{humanize.count(size.kept_parameters)} of {humanize.count(size.dense_parameters)}"
    weights = f"{humanize.size(size.compressed_bytes)} of {humanize.size(size.dense_bytes)}"
    return [
        Card("parameters kept", humanize.share(size.kept_parameters, size.dense_parameters), counts),
        Card("bytes kept", humanize.share(size.compressed_bytes, size.dense_bytes), weights),
    ]


def _verdict_cards(report: Report) -> list[Card]:
    cards = []
    if verdicts := [tier.passed for tier in report.parity if tier.passed is not None]:
        status = "pass" if all(verdicts) else "FAIL"
        cards.append(Card("parity tiers passed", f"{sum(verdicts)} of {len(verdicts)}", status=status))
    if report.fusions:
        found, planned = (
            sum(getattr(fusion, of) for fusion in report.fusions) for of in ("found", "planned")
        )
        complete = all(fusion.found == fusion.planned for fusion in report.fusions)
        status = "ok" if complete else "missed"
        cards.append(Card("fused patterns found", f"{found} of {planned}", status=status))
    return cards


def _drawings(report: Report) -> dict[str, list[Drawing]]:
    """Return the plots of each section by its anchor; a plot without data is left out."""
    groups = matrix_groups(report.findings)
    shown = plots.select_spectra(report.spectra)
    spectra = f"{len(shown)} of {len(report.spectra)} groups; all are in the table. Log scale;"
    wanted = (
        ("matrices", plots.rank_figure(groups), "Chosen rank in each layer."),
        ("matrices", plots.layer_bytes_figure(groups), "Stored bytes of each layer, before and after."),
        ("matrices", plots.role_bytes_figure(groups), "Stored bytes by role, before and after."),
        ("matrices", plots.matrix_error_figure(groups), "Largest weight error in each layer."),
        ("layers", plots.layer_error_figure(report.layer_errors), "Error of each layer's output."),
        (
            "spectra",
            plots.spectra_figure(shown) if shown else None,
            f"{spectra} a vertical line marks a chosen rank.",
        ),
    )
    drawings: dict[str, list[Drawing]] = {}
    for number, (anchor, figure, caption) in enumerate(wanted):
        if figure is not None:
            image = data_uri(figure, f"plot{number}")
            drawings.setdefault(anchor, []).append(Drawing(image, caption))
    return drawings
