"""A model whose weights are exactly reparameterized."""

from __future__ import annotations

from pathlib import Path

import torch

from rk_export.calibration.neuron_peaks import SHORT_TEXT, neuron_peaks
from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.commands.preparations import SCALE_ALPHA
from rk_export.commands.stages import check_outputs
from rk_export.device import resolve_device
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.prepare import Prepare
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.parity.comparison import require_parity
from rk_export.parity.preflight import dense_logits, preflight
from rk_export.parity.tiers import prepared_tier
from rk_export.report.records import Finding
from rk_export.source.prepared import Prepared, save_prepared
from rk_export.source.stored import open_source


def prepare(
    model: str | Path,
    out: str | Path,
    names: tuple[str, ...] = ("fold", "rotate-heads", "scale"),
    *,
    base: str | Path | None = None,
    run: Run | None = None,
    seed: int = 0,
    force: bool = False,
) -> tuple[Finding, ...]:
    """Write a model whose weights are exactly reparameterized: a plain HF folder with the same logits.

    Args:
        model: HF folder, hub id or GGUF file.
        out: Folder to write; `rotate` unties a tied embedding there.
        names: Names from `rk_export.options.prepare.PREPARATIONS`.
        base: As in `compress`.
        run: As in `compress`.
        seed: Of the rotations, and of the text whose peaks `scale` evens out.
        force: Replace an existing output.

    Raises:
        InputError: If the model, a name or the output cannot be used.
        ParityError: If the prepared model computes other logits; nothing is written.
    """
    device = resolve_device((run or Run()).device)
    source, peaks = open_source(model, base), {}
    check_outputs(source, out, force=force)
    before = preflight(source, Recipe((Prepare(names),)))
    if "scale" in names:
        text = calibration_tokens(source, CalibrationOptions(tokens=SHORT_TEXT, seed=seed), device)
        peaks = neuron_peaks(source, text, device)
    change = Prepared(source.description, names, seed=seed, peaks=peaks, alpha=SCALE_ALPHA)
    logits, _ = dense_logits(source.then(change), torch.from_numpy(before.probe.batch))
    require_parity((prepared_tier(before, logits.numpy(), change.names),), source.name)
    return save_prepared(source, names, Path(out), seed=seed, peaks=peaks, alpha=SCALE_ALPHA, force=force)
