"""The exact reparameterizations of a run: those that were named, or those that lower the predicted loss."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from rk_export.calibration.neuron_peaks import SHORT_TEXT, neuron_peaks, shortened
from rk_export.options.prepare import PREPARATIONS
from rk_export.options.recipe import Recipe
from rk_export.planning.preparation_choice import PreparationChoice, Rounding, choose_preparations
from rk_export.source.prepared import LayerPreparation, Prepared
from rk_export.source.protocol import Source
from rk_export.source.transformed import Transformed

logger = logging.getLogger(__name__)

# How far the peaks are evened out. SmolLM2 with int8 inputs, all linear layers: perplexity 22.84, 22.54 and 22.59 at
# 0, 0.25 and 0.5.
SCALE_ALPHA = 0.25


def decided_preparations(
    source: Source,
    recipe: Recipe,
    tokens: Tensor | None,
    device: torch.device,
    folder: Path | None = None,
) -> PreparationChoice:
    """Return the reparameterizations that were named, or those that lower the predicted loss.

    Args:
        source: The dense model, as it is.
        recipe: With `prepared_for`, the format to predict for.
        tokens: Calibration text; without it nothing is predicted, and nothing is taken that was not named.
        device: Where the text runs.
        folder: As in `dense_statistics`.
    """
    spec = recipe.prepared_for
    if spec is None or tokens is None or source.architecture.is_encoder:
        return PreparationChoice(recipe.preparations, ())
    names: tuple[str, ...] = PREPARATIONS[:3]
    peaks: dict[str, Tensor] = {}
    if spec.activations == 8:
        names, peaks = PREPARATIONS, neuron_peaks(source, shortened(tokens), device)
    preparation = LayerPreparation(source.description, names, recipe.calibration.seed, peaks, SCALE_ALPHA)
    int8_inputs = recipe.target.ep == "cpu" and recipe.target.accuracy_level == 4
    rounding = Rounding(spec, compensated=recipe.quantizer == "gptq", int8_inputs=int8_inputs)
    return choose_preparations(source, tokens, rounding, preparation, device, folder=folder)


def prepared_source(
    source: Transformed, recipe: Recipe, tokens: Tensor | None, device: torch.device
) -> Transformed:
    """Return the model under the exact reparameterizations that the options ask for.

    Args:
        source: The dense model.
        recipe: With `preparations`.
        tokens: Calibration text; without it peaks are not evened out.
        device: Where peaks are measured.
    """
    names, peaks = recipe.preparations, {}
    if tokens is None:
        names = tuple(name for name in names if name != "scale")
    elif "scale" in names:
        logger.info("peaks of the FFN neurons on %d tokens", SHORT_TEXT)
        peaks = neuron_peaks(source, shortened(tokens), device)
    if not names:
        return source
    seed = recipe.calibration.seed
    return source.then(Prepared(source.description, names, seed=seed, peaks=peaks, alpha=SCALE_ALPHA))
