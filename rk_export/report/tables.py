"""The tables of a report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rk_export.report import humanize
from rk_export.report.matrix_groups import MatrixGroup, matrix_groups
from rk_export.report.records import Finding, Fusion, LayerError, Outcome, ParityTier, SizeSummary, Spectrum
from rk_export.report.table import Column, Table, make_table

CHOICES = ("rank", "entries", "pairs", "bits", "activations", "block")
VERDICTS = {True: "pass", False: "FAIL", None: "info"}


def size_table(size: SizeSummary) -> Table:
    """Parameters and bytes, before and after; the kept share counts scales, zero points and indices."""
    parameters = map(humanize.count, (size.dense_parameters, size.kept_parameters))
    weights = map(humanize.size, (size.dense_bytes, size.compressed_bytes))
    rows = [
        ("parameters", *parameters, humanize.share(size.kept_parameters, size.dense_parameters)),
        ("weights", *weights, humanize.share(size.compressed_bytes, size.dense_bytes)),
    ]
    if size.file_bytes is not None:
        files = humanize.size(size.file_bytes), humanize.share(size.file_bytes, size.dense_bytes)
        rows.append(("files", "", *files))
    titles = Column("before", "number"), Column("after", "number"), Column("kept", "number")
    return make_table((Column("what"), *titles), rows)


def mapping_table(name: str, value: str, values: Mapping[str, str]) -> Table:
    """One row a key, values already formatted."""
    return Table((Column(name), Column(value, "number")), tuple(values.items()))


def parity_table(tiers: Iterable[ParityTier]) -> Table:
    """One row a tier: error, bound and verdict; ``info`` where the error belongs to the method."""
    titles = ("max error", "relative", "bound", "KL (nats)", "same top-1")
    numbers = tuple(Column(title, "number") for title in titles)
    columns = (
        Column("tier", "name"),
        Column("result", "status"),
        Column("compared"),
        *numbers,
        Column("note"),
    )
    return make_table(columns, map(_parity_row, tiers))


def _parity_row(tier: ParityTier) -> tuple[str, ...]:
    return (
        tier.tier,
        "not measured" if tier.max_error is None else VERDICTS[tier.passed],
        tier.name,
        *map(humanize.number, (tier.max_error, tier.relative_error, tier.bound, tier.kl)),
        humanize.share(tier.top1_agreement),
        tier.note,
    )


def fusions_table(fusions: Iterable[Fusion]) -> Table:
    """One row a pattern: planned, found, and whether the two agree."""
    numbers = Column("planned", "number"), Column("found", "number")
    columns = (Column("pattern"), Column("result", "status"), *numbers, Column("why"))
    rows = (
        (fusion.pattern, _fusion_verdict(fusion), str(fusion.planned), str(fusion.found), fusion.reason)
        for fusion in fusions
    )
    return make_table(columns, rows)


def _fusion_verdict(fusion: Fusion) -> str:
    if fusion.found == fusion.planned:
        return "ok"
    return "missed" if fusion.found < fusion.planned else "extra"


def matrices_table(findings: Sequence[Finding]) -> Table:
    """One row a matrix group: what was chosen, bytes before and after, errors in pass order, and why."""
    titles = (*CHOICES, "before", "after", "kept", "error")
    columns = (Column("matrix group", "name"), Column("outcome", "status"))
    numbers = tuple(Column(title, "number") for title in titles)
    return make_table((*columns, *numbers, Column("why")), map(_matrix_row, matrix_groups(findings)))


def _matrix_row(group: MatrixGroup) -> tuple[str, ...]:
    before, after = group.bytes_before, group.bytes_after
    return (
        group.target,
        group.status,
        *(_choices(group, key) for key in CHOICES),
        humanize.size(before) if before else humanize.ABSENT,
        humanize.size(after) if before else humanize.ABSENT,
        humanize.share(after, before),
        ", ".join(map(humanize.number, group.errors)),
        group.reason,
    )


def _choices(group: MatrixGroup, key: str) -> str:
    values = group.choices(key)
    if key == "pairs" and values == (1,):
        return ""  # one factor pair is the usual case
    return ", ".join(map(_choice, values))


def _choice(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:
        low, high = min(value), max(value)
        return f"{low}" if low == high else f"{low}-{high}"
    return str(value)


def not_applied_table(findings: Iterable[Finding]) -> Table:
    """Skipped and refused targets with the reason; layers with the same reason share a row."""
    layers: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for finding in findings:
        if finding.outcome is not Outcome.APPLIED:
            group = MatrixGroup(finding.target, (finding,))
            layers[group.role, finding.outcome.value, finding.reason] += (
                [] if group.layer is None else [group.layer]
            )
    columns = Column("matrix group", "name"), Column("layers"), Column("outcome", "status"), Column("why")
    rows = ((role, humanize.ranges(at), outcome, why) for (role, outcome, why), at in layers.items())
    return make_table(columns, rows)


def layer_errors_table(errors: Iterable[LayerError]) -> Table:
    """One row a decoder layer."""
    columns = (Column("layer", "number"), Column("factorized", "number"), Column("and quantized", "number"))
    number = humanize.number
    rows = ((str(error.layer), number(error.factorized), number(error.quantized)) for error in errors)
    return make_table(columns, rows)


def spectra_table(spectra: Iterable[Spectrum]) -> Table:
    """One row a group: the chosen rank beside what each rule of thumb would choose."""
    titles = (
        "chosen rank",
        "full rank",
        "effective",
        "stable",
        "90 % energy",
        "95 %",
        "99 %",
        "Gavish-Donoho",
    )
    columns = (Column("matrix group", "name"), *(Column(title, "number") for title in titles))
    return make_table(columns, map(_spectrum_row, spectra))


def _spectrum_row(spectrum: Spectrum) -> tuple[str, ...]:
    energy = spectrum.energy_rank_90, spectrum.energy_rank_95, spectrum.energy_rank_99
    return (
        spectrum.target,
        humanize.ABSENT if spectrum.chosen_rank is None else str(spectrum.chosen_rank),
        str(spectrum.full_rank),
        humanize.number(spectrum.effective_rank),
        humanize.number(spectrum.stable_rank),
        *map(str, (*energy, spectrum.gavish_donoho_rank)),
    )
