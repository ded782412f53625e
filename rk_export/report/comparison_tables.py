"""The tables of a comparison: terminal and page show the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rk_export.report import humanize
from rk_export.report.comparison import Compared, Comparison, MatrixChoice, Score
from rk_export.report.records import ParityTier
from rk_export.report.table import Column, Table, make_table
from rk_export.report.tables import VERDICTS

Row = tuple[str, ...]


def overview_table(comparison: Comparison) -> Table:
    """One row a measure, one column a model; a row of differences under each score."""
    models = comparison.models
    rows: list[Row] = [
        ("made from", *(model.made_from for model in models)),
        ("files", *(humanize.size(model.file_bytes) for model in models)),
        ("parameters", *map(_parameters, models)),
        ("kept parameters", *map(_kept, models)),
        *(row for on, measure in comparison.measures for row in _score_rows(models, on, measure)),
        *(
            (f"{phase} tok/s", *(humanize.number(model.speed.get(phase)) for model in models))
            for phase in dict.fromkeys(phase for model in models for phase in model.speed)
        ),
        ("parity passed", *map(_parity, models)),
    ]
    columns = (Column("measure"), *(Column(model.name, "number") for model in models))
    filled = [row for row in rows if any(cell not in ("", humanize.ABSENT) for cell in row[1:])]
    return Table(columns, tuple(tuple(cell or humanize.ABSENT for cell in row) for row in filled))


def _parameters(model: Compared) -> str:
    return humanize.count(None if model.size is None else model.size.kept_parameters)


def _kept(model: Compared) -> str:
    size = model.size
    return humanize.ABSENT if size is None else humanize.share(size.kept_parameters, size.dense_parameters)


def _parity(model: Compared) -> str:
    verdicts = [tier.passed for tier in model.parity if tier.passed is not None]
    return f"{sum(verdicts)} of {len(verdicts)}" if verdicts else humanize.ABSENT


def _score_rows(models: Sequence[Compared], on: str, measure: str) -> Iterable[Row]:
    scores = [model.score(on, measure) for model in models]
    yield (f"{measure} on {on}", *map(_score, scores))
    if any(one is not None and one.difference is not None for one in scores):
        yield (f"difference to {models[0].name}", *map(_difference, scores))


def _score(score: Score | None) -> str:
    return "" if score is None else plus_minus(score.value, score.error)


def _difference(score: Score | None) -> str:
    if score is None or score.difference is None:
        return ""
    return plus_minus(score.difference, score.difference_error, sign="+")


def plus_minus(value: float, error: float | None, sign: str = "") -> str:
    """Return ``25.213 ± 0.104``; without the error where it is not known."""
    shown = f"{value:{sign}.3f}" if abs(value) < 1e5 else f"{value:{sign}.3e}"
    return shown if error is None or error != error else f"{shown} ± {error:.3f}"


def parity_table(models: Sequence[Compared]) -> Table:
    """One row a tier, one column a model: verdict and relative error."""
    found = [{tier.tier: tier for tier in model.parity} for model in models]
    names = {tier.tier: tier.name for tiers in reversed(found) for tier in tiers.values()}
    order = list(dict.fromkeys(letter for tiers in found for letter in tiers))
    columns = (
        Column("tier", "name"),
        Column("compared"),
        *(Column(model.name, "number") for model in models),
    )
    rows = [(letter, names[letter], *(_tier(tiers.get(letter)) for tiers in found)) for letter in order]
    return make_table(columns, rows)


def _tier(tier: ParityTier | None) -> str:
    if tier is None or tier.relative_error is None:
        return ""
    return f"{VERDICTS[tier.passed]} {humanize.number(tier.relative_error)}"


def roles_table(models: Sequence[Compared]) -> Table:
    """One row a role, one column a model: the forms, ranks and formats that its matrices have."""
    models = [model for model in models if model.matrices]
    roles = dict.fromkeys(one.role for model in models for one in model.matrices.values())
    columns = (Column("matrix", "name"), *(Column(model.name) for model in models))
    rows = [
        (role, *(_in_short([one for one in model.matrices.values() if one.role == role]) for model in models))
        for role in roles
    ]
    return make_table(columns, rows)


def _in_short(choices: Sequence[MatrixChoice]) -> str:
    if not choices:
        return ""
    forms = "/".join(dict.fromkeys(one.form.replace("_", " ") for one in choices))
    ranks = sorted(one.rank for one in choices if one.rank)
    formats = "/".join(dict.fromkeys(_format(one) for one in choices))
    parts = [forms, f"rank {_span(ranks)}" if ranks else "", formats]
    worst = max((error for one in choices for error in one.errors), default=None)
    error = "" if worst is None else f"error up to {humanize.number(worst)}"
    return ", ".join(part for part in (*parts, error) if part)


def _format(choice: MatrixChoice) -> str:
    return "floats" if choice.bits is None else f"INT{choice.bits}"


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def matrices_table(comparison: Comparison) -> Table:
    """One row a matrix that the models treat differently: the choice and the error of each."""
    models = [model for model in comparison.models if model.matrices]
    columns = [Column("matrix", "name")]
    for model in models:
        columns += [Column(model.name), Column("error", "number")]
    rows = [
        (name, *(cell for one in choices for cell in _cells(one)))
        for name, choices in comparison.differing.items()
    ]
    return make_table(columns, rows)


def _cells(choice: MatrixChoice | None) -> Row:
    if choice is None:
        return "", ""
    return choice.choice, ", ".join(map(humanize.number, choice.errors))
