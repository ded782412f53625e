"""What is known of one model of a comparison before it is run: its files, its report, its plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rk_export.errors import InputError
from rk_export.folders import read_report
from rk_export.manifest import check_manifest
from rk_export.plan import Plan, SitePlan
from rk_export.report.comparison import Compared, MatrixChoice
from rk_export.report.matrix_groups import matrix_groups
from rk_export.report.records import Report, SizeSummary
from rk_export.rewrite.checkpoint import is_checkpoint
from rk_export.runtime.bundle_files import MODEL_FILE
from rk_export.source.stored import open_source


def is_bundle(model: str | Path) -> bool:
    """Whether a folder holds an exported graph."""
    return (Path(model).expanduser() / MODEL_FILE).is_file()


def opened(model: str | Path, name: str, measured: bool, base: str | Path | None) -> Compared:
    """Return what is known of a model without running it.

    Args:
        model: As in `compare`.
        name: What tells it from the others.
        measured: Whether it will be run; a model without a report needs that.
        base: As in `compare`.

    Raises:
        InputError: The bundle is damaged, or there is nothing to compare.
    """
    folder = Path(model).expanduser()
    if is_bundle(folder):
        return _bundle(folder, name)
    if not measured and not folder.exists():
        raise InputError(
            "no such folder", where=str(model), fix="give a folder that compress or export wrote"
        )
    if not measured:
        raise InputError(
            "no bundle here: a model or checkpoint has no report to compare",
            where=str(model),
            fix="give a folder that compress or export wrote, or add --text FILE or --tasks FILE to measure it",
        )
    if folder.is_dir() and is_checkpoint(folder):
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return Compared(name, "checkpoint", file_bytes=size)
    source = open_source(model, base)
    count, size = source.parameter_count(), source.stored_bytes()
    return Compared(name, "model", file_bytes=size, size=SizeSummary(count, count, size, size))


def _bundle(folder: Path, name: str) -> Compared:
    check_manifest(folder, hashes=False)
    report, plan = read_report(folder), Plan.load(folder / "plan.json")
    return Compared(
        name,
        "bundle",
        made_from=report.model,
        file_bytes=sum(path.stat().st_size for path in folder.glob(f"{MODEL_FILE}*")),
        size=report.size,
        parity=report.parity,
        layer_errors=report.layer_errors,
        layer_bytes=_layer_bytes(report),
        matrices=dict(_choices(plan, report)),
    )


def _layer_bytes(report: Report) -> dict[str, int]:
    stored: dict[str, int] = defaultdict(int)
    for group in matrix_groups(report.findings):
        if group.layer is not None:
            stored[str(group.layer)] += group.bytes_after
    return dict(stored)


def _choices(plan: Plan, report: Report) -> Iterator[tuple[str, MatrixChoice]]:
    """Yield every matrix by its name, with what became of it: layers from the plan, tables from the report."""
    groups = {group.target: group for group in matrix_groups(report.findings)}
    for site in plan.sites:
        errors = groups[site.site].errors if site.site in groups else ()
        for number, role in enumerate(site.members):
            name = role if site.members.count(role) == 1 else site.paths[number]
            yield f"layers.{site.layer}.{name}", _choice(site, role, errors)
    for target, group in groups.items():
        bits = group.choices("bits")
        if group.layer is None and bits:
            block, activations = (next(iter(group.choices(key)), None) for key in ("block", "activations"))
            yield (
                target,
                MatrixChoice(target, "dense", (), 0, 0, bits[-1], block, activations, group.errors),
            )


def _choice(site: SitePlan, role: str, errors: tuple[float, ...]) -> MatrixChoice:
    alone = site.form == "dense"
    quant = site.quant
    return MatrixChoice(
        role,
        site.form,
        () if alone else tuple(other for other in dict.fromkeys(site.members) if other != role),
        site.rank,
        site.entries,
        None if quant is None else quant.bits,
        None if quant is None else quant.block_size,
        None if quant is None else quant.activations,
        errors,
    )
