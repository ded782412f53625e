"""A report for people: text and tables for the terminal, Markdown, and one self-contained HTML page.

All three show the same tables; the page adds the plots. A section with nothing in it is left out, unless a
notice of the report says why it is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rk_export.report import humanize, tables
from rk_export.report.records import Finding, ParityTier, Report, SizeSummary
from rk_export.report.sections import headline, outcomes, sections
from rk_export.report.table import Block, escape_markdown, plain_text


def findings_table(findings: Sequence[Finding]) -> str:
    """Return aligned text, one line a matrix group: what was chosen, bytes before and after, error, why."""
    return tables.matrices_table(findings).text()


def text_table(report: Report) -> str:
    """Return `summary` as plain text."""
    return plain_text(summary(report))


def summary(report: Report) -> tuple[Block, ...]:
    """Return the compact summary for a terminal; everything that was skipped is in it, with its reason."""
    warnings = "\n".join(f"WARNING: {humanize.plain(warning)}" for warning in report.warnings)
    shown = (
        replace(tables.parity_table(report.parity), title="Parity"),
        replace(tables.fusions_table(report.fusions), title="Fused patterns"),
        replace(tables.not_applied_table(report.findings), title="Not applied"),
    )
    head = (warnings, humanize.plain(headline(report)), _lines(report))
    blocks: list[Block] = [*filter(None, head), *(table for table in shown if table.rows)]
    return tuple(filter(None, (*blocks, _notices(report))))


def _notices(report: Report) -> str:
    """Return the notices under their heading, or an empty string."""
    if not report.notices:
        return ""
    return "Notices\n" + "\n".join(f"- {humanize.plain(notice)}" for notice in report.notices)


def _lines(report: Report) -> str:
    """Return the lines of label and value at the head of the terminal summary."""
    lines = {
        **(_size_lines(report.size) if report.size else {}),
        "matrix groups": outcomes(report),
        "time": humanize.duration(sum(report.timings.values())) if report.timings else "",
    }
    filled = {label: value for label, value in lines.items() if value}
    width = max(map(len, filled), default=0)
    return "\n".join(f"{label.ljust(width)}  {humanize.plain(value)}" for label, value in filled.items())


def _size_lines(size: SizeSummary) -> dict[str, str]:
    kept = humanize.share(size.kept_parameters, size.dense_parameters)
    stored = humanize.share(size.compressed_bytes, size.dense_bytes)
    counts = f"{humanize.count(size.kept_parameters)} of {humanize.count(size.dense_parameters)}"
    weights = f"{humanize.size(size.dense_bytes)} → {humanize.size(size.compressed_bytes)}"
    files = "" if size.file_bytes is None else humanize.size(size.file_bytes)
    return {
        "kept parameters": f"{kept} ({counts})",
        "weights": f"{weights} ({stored})",
        "exported files": files,
    }


def markdown(report: Report) -> str:
    """Return the report as Markdown, without plots."""
    lines = [f"# {escape_markdown(headline(report))}"]
    lines += [f"**Warning: {escape_markdown(warning)}**" for warning in report.warnings]
    if report.notices:
        lines.append("\n".join(f"- {escape_markdown(notice)}" for notice in report.notices))
    for section in sections(report):
        lines += [f"## {section.title}", section.intro]
        lines += [f"Note: {escape_markdown(notice)}" for notice in section.notices]
        if section.command:
            lines.append("\n".join(f"    {line}" for line in section.command.splitlines()))
        if section.table is not None:
            lines.append(section.table.markdown())
    return "\n\n".join(lines) + "\n"


def html(report: Report) -> str:
    """Return the report as one HTML page with inline plots; it loads nothing and runs no script."""
    from rk_export.report import page

    return page.html(report)


def parity_text(tiers: Sequence[ParityTier]) -> str:
    """Return aligned text, one line a tier: error, scale, bound, divergence, agreement, verdict."""
    return tables.parity_table(tiers).text()
