"""The sections of a report, in reading order; Markdown and the HTML page show the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rk_export.report import humanize, tables
from rk_export.report.matrix_groups import matrix_groups
from rk_export.report.records import Report
from rk_export.report.table import Table

INTROS = {
    "size": "Kept shares count every factor, scale, zero point and index.",
    "parity": "Largest difference of a logit, and relative to the largest logit. A tier without a bound is "
    "the error of the method (factorization, quantization); a tier with one compares two ways to compute the "
    "same model.",
    "fusions": "Patterns that the plan asks for, and those counted in the exported graph.",
    "matrices": "Bytes are stored bytes of the group's weights. Errors are relative Frobenius errors, one "
    "for each pass in its order.",
    "layers": "Relative Frobenius error of each decoder layer's output against the dense model.",
    "spectra": "How fast the singular values of each group fall: the rank chosen, and the ranks that common "
    "rules would choose.",
    "timings": "Wall-clock time of each stage.",
    "reproduce": "The command, and the versions it ran with.",
}
TITLES = {
    "size": "Size",
    "parity": "Parity",
    "fusions": "Fused patterns",
    "matrices": "What happened to each matrix",
    "layers": "Error per layer",
    "spectra": "Singular spectra",
    "timings": "Time",
    "reproduce": "How to reproduce",
}


@dataclass(frozen=True)
class Section:
    """One part of a report or of a comparison.

    Args:
        anchor: Its name in links and at the head of a notice.
        title: The heading.
        intro: What the table means, in a sentence.
        table: What it shows, or None.
        notices: Why it is empty, or what to know about it.
        command: Command line to show above the table.
        compact: The page may set the section beside others: its table has a few short columns.
        folded: The page folds the table away under these words; empty leaves it open.
    """

    anchor: str
    title: str
    intro: str
    table: Table | None = None
    notices: tuple[str, ...] = ()
    command: str = ""
    compact: bool = False
    folded: str = ""


def sections(report: Report) -> list[Section]:
    """Return the sections that have something to show, or a notice that says why they have not."""
    filled = []
    for anchor, table in _tables(report).items():
        command = report.command if anchor == "reproduce" else ""
        notices = _notices_for(report, anchor)
        if table is not None and not table.rows:
            table = None
        if table or notices or command:
            compact = anchor == "size"
            folded = "The same as a table" if anchor == "layers" else ""
            named = (anchor, TITLES[anchor], INTROS[anchor])
            filled.append(Section(*named, table, notices, command, compact, folded))
    return filled


def _tables(report: Report) -> dict[str, Table | None]:
    return {
        "size": tables.size_table(report.size) if report.size else None,
        "parity": tables.parity_table(report.parity),
        "fusions": tables.fusions_table(report.fusions),
        "matrices": tables.matrices_table(report.findings),
        "layers": tables.layer_errors_table(report.layer_errors),
        "spectra": tables.spectra_table(report.spectra),
        "timings": tables.mapping_table("stage", "time", _durations(report.timings)),
        "reproduce": tables.mapping_table("software", "version", report.versions),
    }


def _notices_for(report: Report, anchor: str) -> tuple[str, ...]:
    prefix = f"{anchor}:"
    return tuple(text[len(prefix) :].strip() for text in report.notices if text.lower().startswith(prefix))


def _numbers(values: Mapping[str, float]) -> dict[str, str]:
    return {name: humanize.number(value) for name, value in values.items()}


def _durations(timings: Mapping[str, float]) -> dict[str, str]:
    total = {"total": sum(timings.values())} if len(timings) > 1 else {}
    return {stage: humanize.duration(seconds) for stage, seconds in {**timings, **total}.items()}


def headline(report: Report) -> str:
    """Return the model, its architecture and the date, on one line."""
    kind = f" ({report.model_type})" if report.model_type else ""
    return ", ".join(part for part in (report.model + kind, report.created) if part)


def pairs(values: Mapping[str, float]) -> str:
    """Return ``dense 22.5, compressed 27.1``."""
    return ", ".join(f"{name} {value}" for name, value in _numbers(values).items())


def outcomes(report: Report) -> str:
    """Return how many matrix groups met which outcome: ``147 applied, 3 partly, 1 refused``."""
    counts = Counter(group.status for group in matrix_groups(report.findings))
    order = ("applied", "partly", "skipped", "refused")
    return ", ".join(f"{counts[status]} {status}" for status in order if counts[status])
