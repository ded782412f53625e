"""From the dense model to the one that is compressed: reparameterized exactly, pruned, tuned for a task."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from rk_export.calibration.model_statistics import model_statistics
from rk_export.calibration.neuron_peaks import SHORT_TEXT, neuron_peaks, shortened
from rk_export.calibration.redundancy import block_influence
from rk_export.calibration.target_text import target_tokens
from rk_export.methods.basel.selection import Selection, select_basis
from rk_export.methods.prune.pruned import Pruned, chosen_pruning
from rk_export.options.compress import PREPARATIONS, CompressOptions
from rk_export.options.methods import BaselOptions
from rk_export.plan import Pruning
from rk_export.planning.preparation_choice import PreparationChoice, Rounding, choose_preparations
from rk_export.source.prepared import LayerPreparation, Prepared
from rk_export.source.protocol import Source
from rk_export.source.transformed import Transformed

logger = logging.getLogger(__name__)

# How far the peaks are evened out. SmolLM2 with int8 inputs, all linear layers: perplexity 22.84, 22.54 and 22.59 at
# 0, 0.25 and 0.5.
SCALE_ALPHA = 0.25
# Tokens that a sequence of a target task has.
TASK_LENGTH = 256


def decided_preparations(
    source: Source, options: CompressOptions, tokens: Tensor | None, device: torch.device
) -> PreparationChoice:
    """Return the reparameterizations that were named, or those that lower the predicted loss.

    Args:
        source: The dense model, as it is.
        options: With `prepared_for`, the format to predict for.
        tokens: Calibration text; without it nothing is predicted, and nothing is taken that was not named.
        device: Where the text runs.
    """
    spec = options.prepared_for
    if spec is None or tokens is None or source.architecture.is_encoder:
        return PreparationChoice(options.preparations, ())
    names: tuple[str, ...] = PREPARATIONS[:3]
    peaks: dict[str, Tensor] = {}
    if spec.activations == 8:
        names, peaks = PREPARATIONS, neuron_peaks(source, shortened(tokens), device)
    logger.info("predicting what each reparameterization would save, on %d tokens", shortened(tokens).numel())
    preparation = LayerPreparation(source.description, names, options.calibration.seed, peaks, SCALE_ALPHA)
    int8_inputs = options.ep == "cpu" and options.accuracy_level == 4
    rounding = Rounding(spec, compensated=options.quantizer == "gptq", int8_inputs=int8_inputs)
    return choose_preparations(source, tokens, rounding, preparation, device)


def prepared_source(
    source: Transformed, options: CompressOptions, tokens: Tensor | None, device: torch.device
) -> Transformed:
    """Return the model under the exact reparameterizations that the options ask for.

    Args:
        source: The dense model.
        options: With `preparations`.
        tokens: Calibration text; without it peaks are not evened out.
        device: Where peaks are measured.
    """
    names, peaks = options.preparations, {}
    if tokens is None:
        names = tuple(name for name in names if name != "scale")
    elif "scale" in names:
        logger.info("peaks of the FFN neurons on %d tokens", SHORT_TEXT)
        peaks = neuron_peaks(source, shortened(tokens), device)
    if not names:
        return source
    seed = options.calibration.seed
    return source.then(Prepared(source.description, names, seed=seed, peaks=peaks, alpha=SCALE_ALPHA))


def pruned_source(
    source: Transformed,
    options: CompressOptions,
    pruning: Pruning | None,
    tokens: Tensor | None,
    device: torch.device,
) -> Transformed:
    """Return what is left of a model, or the model where nothing is to go.

    Args:
        source: The dense model, prepared.
        options: With `prune`.
        pruning: What a plan says stays; None chooses.
        tokens: Calibration text; without it weights alone decide.
        device: Where scores and corrections are computed.
    """
    wanted, statistics, influence = options.prune, None, [0.0] * source.layer_count
    if pruning is None and wanted is None:
        return source
    if tokens is not None:
        statistics = model_statistics(source, tokens, options)
        if pruning is None and wanted is not None and wanted.blocks:
            influence = block_influence(source, tokens, device)
    if pruning is None and wanted is not None:
        pruning = chosen_pruning(source, wanted, influence, statistics)
    if pruning is None:
        return source
    return source.then(Pruned(source.description, pruning, statistics, device))


def selected_bases(
    source: Source, options: CompressOptions, device: torch.device, state: Path | None
) -> Selection:
    """Train for the task that the options name, and return what is left of every matrix.

    Args:
        source: The dense model, prepared and pruned.
        options: With `basel` and `rank`.
        device: Where it trains.
        state: Where the training keeps its state; None keeps none.
    """
    if options.basel is None or options.rank is None:
        raise ValueError("no basis selection was asked for")
    tokens = task_tokens(source, options.basel)
    return select_basis(source, tokens, options.rank, options.basel, device=device, state=state)


def task_tokens(source: Source, options: BaselOptions) -> Tensor:
    """Return the text of a target task, int64 (sequences, length), at most what the training reads.

    Raises:
        InputError: If the file is missing, empty, no UTF-8 text or too short for one sequence.
    """
    length = min(TASK_LENGTH, int(source.config.max_position_embeddings))
    wanted = (options.steps + options.tune) * options.batch_tokens
    rows = int(source.config.vocab_size)
    return target_tokens(options.target, source.folder, length, -(-wanted // length), rows=rows)
