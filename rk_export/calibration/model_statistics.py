"""Statistics of a dense model as the options ask: with gradients, with their diagonals, or by relative error."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics, layerwise
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.options.recipe import Recipe
from rk_export.report.humanize import size
from rk_export.report.records import Finding, Outcome
from rk_export.source.protocol import Source

logger = logging.getLogger(__name__)

# Bytes; beyond them only the diagonals of the gradients' moments are kept.
GRADIENT_LIMIT = 8_000_000_000
# Diagonals settle with little text: by the gradients of 4096 tokens, formats of SmolLM2 that were chosen by those of
# 1024 lose 0.0497 nats, those chosen by 2048 lose 0.0495.
DIAGONAL_TOKENS = 1024


def model_statistics(
    source: Source,
    tokens: Tensor,
    recipe: Recipe,
    device: torch.device,
    *,
    directions: bool = True,
    folder: Path | None = None,
) -> DenseStatistics:
    """Gather statistics of a dense model on a text, or read those of an earlier run.

    Args:
        source: The model.
        tokens: Calibration text, int64 (sequences, length).
        recipe: Whether outputs weigh by gradients.
        device: Where the model runs.
        directions: Whether whole second moments of the gradients are needed, or their diagonals do.
        folder: As in `dense_statistics`.
    """
    weighed = recipe.weighs_outputs
    wanted = weighed and recipe.calibration.gradients
    back = back_tokens(tokens.numel(), directions=directions)
    statistics = dense_statistics(
        source,
        tokens,
        diagonal=not (wanted and directions) or only_diagonals(source, recipe),
        device=device,
        gradient_tokens=back if wanted else 0,
        folder=folder,
    )
    if wanted or not weighed:
        return statistics
    logger.info("outputs weigh by relative error, layer by layer")
    return layerwise(statistics, source.layers())


def back_tokens(tokens: int, *, directions: bool) -> int:
    """Return how many of the tokens of a text run back, as `model_statistics` is told of directions."""
    return tokens // 2 if directions else min(tokens, DIAGONAL_TOKENS)


def only_diagonals(source: Source, recipe: Recipe) -> bool:
    """Whether the gradients' whole second moments would take too much memory."""
    return recipe.weighs_outputs and recipe.calibration.gradients and gradient_bytes(source) > GRADIENT_LIMIT


def diagonals_finding(source: Source) -> Finding:
    """Return the finding that says so."""
    needed = size(gradient_bytes(source))
    return Finding("metric", Outcome.SKIPPED, f"gradients by their diagonals: whole ones take {needed}")


def gradient_bytes(source: Source) -> int:
    """Return the bytes of the whole second moments of all output gradients, float32."""
    return 4 * sum(matrix.shape[0] ** 2 for matrix in source.description.matrices)
