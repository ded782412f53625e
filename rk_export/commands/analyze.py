"""Spectral analysis of a model: singular values, effective ranks and energy of every group (2402.16319)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from rk_export.device import resolve_device
from rk_export.folders import AtomicFolder, check_replaceable, library_versions
from rk_export.options.compress import CompressOptions
from rk_export.passes.numerics.joint_svd import singular_values
from rk_export.passes.numerics.ranks import spectrum
from rk_export.passes.weights.joint_rank import stacked_pairs
from rk_export.planning.planner import layer_sites, with_default_groups
from rk_export.report.plots import save_spectra_plots
from rk_export.report.records import Report, Spectrum
from rk_export.report.render import html
from rk_export.source.protocol import Source
from rk_export.source.stored import open_source

logger = logging.getLogger(__name__)


def spectra(source: Source, options: CompressOptions) -> Iterator[Spectrum]:
    """Yield the spectrum of every group of every layer; ranks are those that the options would choose."""
    device, options = resolve_device(options.device), with_default_groups(source, options)
    for layer in source.layers():
        logger.info("layer %d of %d", layer.index + 1, source.layer_count)
        for site in layer_sites(layer, source.description.projections(layer.index), options):
            if site.site.rpartition(".")[2] not in (options.groups or ()):
                continue
            for target, rows in stacked_pairs(layer, site):
                stacked = torch.cat([linear.weight.to(device) for linear in rows.values()])
                yield spectrum(target, singular_values(stacked).cpu(), site.rank or None)


def analyze(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    base: str | Path | None = None,
    command: str = "",
    force: bool = False,
) -> Report:
    """Write spectra as JSON, plots and one HTML page into a folder; return the report.

    Args:
        model: HF folder, hub id or GGUF file.
        out: Folder for report.json, report.html and the plots.
        options: Groups to stack, and the rank rule whose ranks are marked.
        base: Base model of a LoRA adapter; None takes the one that it names.
        command: Command line to note in the report.
        force: Replace an existing output.

    Raises:
        InputError: If the folder exists and `force` is not set, or the model is broken.
    """
    source = open_source(model, base)
    check_replaceable(Path(out).expanduser(), force, inputs=source.places)
    with AtomicFolder(out, force=force) as partial:
        report = Report(
            model=source.title,
            model_type=source.config.model_type,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            versions=library_versions(),
            spectra=tuple(spectra(source, options or CompressOptions())),
            notices=source.notices,
        )
        report.save(partial / "report.json")
        (partial / "report.html").write_text(html(report), encoding="utf-8")
        save_spectra_plots(report.spectra, partial)
    return report
