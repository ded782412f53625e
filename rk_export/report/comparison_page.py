"""A comparison for people: tables for the terminal, and one page with plots."""

from __future__ import annotations

from rk_export.report import plots
from rk_export.report.comparison import Compared, Comparison
from rk_export.report.comparison_tables import matrices_table, overview_table, parity_table, roles_table
from rk_export.report.page import Drawing, Page
from rk_export.report.sections import Section
from rk_export.report.svg import data_uri
from rk_export.report.table import Block

_INTROS = {
    "overview": ("Side by side", "Differences are to the first model."),
    "quality": (
        "Size against quality",
        "Left is smaller. For perplexity lower is better, for accuracy higher.",
    ),
    "parity": ("Parity", "Verdict and relative error of each tier, from the bundles' reports."),
    "roles": ("What was chosen", "For each kind of matrix: the forms, ranks, formats and the largest error."),
    "matrices": ("Where the choices differ", ""),
    "layers": ("Layer by layer", "What each layer stores, and how far its output is from the dense model's."),
    "reproduce": ("How to reproduce", "The command."),
}


def comparison_blocks(comparison: Comparison) -> tuple[Block, ...]:
    """Return what the terminal shows: the overview and what was chosen."""
    roles = roles_table(comparison.models)
    return tuple(block for block in (overview_table(comparison), roles if roles.rows else "") if block)


def comparison_html(comparison: Comparison) -> str:
    """Return the page; it loads nothing and runs no script."""
    names = [model.name for model in comparison.models]
    heading = f"{', '.join(names[:-1])} and {names[-1]}"
    drawings = _drawings(comparison)
    return Page(
        f"{heading} – rk-export comparison",
        heading,
        "side by side",
        _sections(comparison, drawings),
        drawings,
    ).html()


def _sections(comparison: Comparison, drawings: dict[str, list[Drawing]]) -> list[Section]:
    tables = {
        "overview": overview_table(comparison),
        "quality": None,
        "parity": parity_table(comparison.models),
        "roles": roles_table(comparison.models),
        "layers": None,
        "matrices": matrices_table(comparison),
        "reproduce": None,
    }
    sections = []
    for anchor, table in tables.items():
        title, intro = _INTROS[anchor]
        if anchor == "matrices":
            intro = _differing(comparison)
        command = comparison.command if anchor == "reproduce" else ""
        table = table if table is not None and table.rows else None
        if table or command or drawings.get(anchor) or (anchor == "matrices" and intro):
            sections.append(Section(anchor, title, intro, table, command=command))
    return sections


def _differing(comparison: Comparison) -> str:
    """Return how many matrices are treated differently, or an empty string where fewer than two models tell."""
    models = [model for model in comparison.models if model.matrices]
    if len(models) < 2:
        return ""
    names = {name for model in models for name in model.matrices}
    return f"{len(comparison.differing)} of {len(names)} matrices are not treated alike by all models."


def _drawings(comparison: Comparison) -> dict[str, list[Drawing]]:
    models = comparison.models
    wanted = [
        (
            "quality",
            plots.quality_figure(_points(models, on, measure), measure),
            f"Files against {measure}{f' on {on}' if on else ', as reported'}; bars are one standard error.",
        )
        for on, measure in comparison.measures
    ]
    stored = {model.name: {int(n): size / 1e6 for n, size in model.layer_bytes.items()} for model in models}
    errors = {model.name: {one.layer: one.quantized for one in model.layer_errors} for model in models}
    wanted += [
        ("layers", plots.model_lines_figure(stored, "MB"), "Stored bytes of each layer."),
        (
            "layers",
            plots.model_lines_figure(errors, "relative output error"),
            "Error of each layer's output.",
        ),
    ]
    drawings: dict[str, list[Drawing]] = {}
    for number, (anchor, figure, caption) in enumerate(wanted):
        if figure is not None:
            drawings.setdefault(anchor, []).append(Drawing(data_uri(figure, f"plot{number}"), caption))
    return drawings


def _points(
    models: tuple[Compared, ...], on: str, measure: str
) -> list[tuple[str, float, float, float | None]]:
    scores = [(model, model.score(on, measure)) for model in models]
    return [
        (model.name, float(model.file_bytes), score.value, score.error)
        for model, score in scores
        if score is not None and model.file_bytes
    ]
