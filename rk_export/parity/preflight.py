"""What is known of a model before work begins: it is read as transformers reads it, and the options fit it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from rk_export.calibration.streams import Streams
from rk_export.errors import InputError, UnsupportedModelError
from rk_export.memory import give_back
from rk_export.model.class_probe import SAME
from rk_export.model.context import with_context
from rk_export.model.switches import switches_of
from rk_export.options.recipe import Recipe
from rk_export.parity.comparison import FLOAT_BOUND, compare, held_to, relative_error, require_parity
from rk_export.parity.float_steps import ROUNDING_FACTOR, float32_step, shaking_outputs
from rk_export.parity.half_range import Peaks, check_half_range
from rk_export.parity.oracle import transformers_logits
from rk_export.parity.probe import Probe, make_probe
from rk_export.progress import track
from rk_export.report.records import ParityTier
from rk_export.scratch import laid_down, settle
from rk_export.source.protocol import Source
from rk_export.source.stored import StoredModel
from rk_export.source.tokenizer_conversion import check_tokenizer

ORACLE_TIER = "transformers vs PyTorch dense"
_EXACT, _SHAKEN = "exact", "shaken"


@dataclass(frozen=True)
class Preflight:
    """The untouched dense model on the probe, and how it compares with transformers.

    Args:
        probe: The prompts.
        logits: Of the untouched dense model, (prompts, length, width).
        rounding: Relative error of the logits that float32 alone costs: every module's output shaken by one step. Zero
            where it was not asked for.
        tier: Tier 0.
        notices: What the reader of the report must know.
    """

    probe: Probe
    logits: Tensor
    rounding: float
    tier: ParityTier
    notices: tuple[str, ...] = ()


def preflight(source: StoredModel, recipe: Recipe) -> Preflight:
    """Look at a dense model before anything is done to it.

    Args:
        source: The model as it was opened: not prepared, pruned or tuned.
        recipe: What is asked for.

    Raises:
        InputError: If its tokenizer cannot be converted, its logits are not finite, or its activations or weights
            exceed an fp16 graph.
        ParityError: If the model as we read it computes other logits than transformers.
    """
    check_tokenizer(source.folder, source.config.vocab_size)
    probe = make_probe(
        source.folder,
        source.config.vocab_size,
        switches_of(
            replace(source.description, config=with_context(source.config, recipe.target.context_length))
        ),
    )
    tokens = torch.from_numpy(probe.batch)
    peaks = Peaks() if recipe.target.float_dtype == "fp16" else None
    may_prepare = bool(recipe.preparations) or recipe.prepared_for is not None
    logits, rounding = dense_logits(source, tokens, peaks, shaken=may_prepare)
    _check_finite(logits, source)
    reference = transformers_logits(source, tokens[:1])
    expected, found = reference.logits.numpy(), logits[:1].numpy()
    _check_taken(
        source,
        relative_error(expected, found),
        lambda: rounding or dense_logits(source, tokens, shaken=True)[1],
    )
    tier = compare("0", ORACLE_TIER, expected, found, bound=FLOAT_BOUND["fp32"], note=reference.note)
    if not tier.passed:
        tier = _by_its_rounding(tier, rounding or dense_logits(source, tokens, shaken=True)[1])
    fix = "the model is not read as transformers reads it, so nothing was done; report it with the model's config.json"
    require_parity((tier,), source.name, fix)
    notices = () if peaks is None else check_half_range(peaks, source.name)
    return Preflight(probe, logits, rounding, tier, notices)


def _check_taken(source: StoredModel, error: float, rounding: Callable[[], float]) -> None:
    """Hold a model of an unknown type to the family that it is taken as, within what float32 alone does to it."""
    if source.taken is None or error <= SAME:
        return
    if error > min(ROUNDING_FACTOR * rounding(), FLOAT_BOUND["fp32"]):
        raise UnsupportedModelError(
            f"the model type {source.taken.stated.model_type!r} is not supported: with this model's weights its class "
            f"computes other logits than {source.config.model_type} ({error:.2g} of the largest)",
            where=source.name,
        )


def _by_its_rounding(tier: ParityTier, rounding: float) -> ParityTier:
    """Return a tier that breaks the common bound under what float32 alone does to this model."""
    note = f"{tier.note}; float32 steps move the logits by {rounding:.2g}"
    return held_to(replace(tier, note=note), max(FLOAT_BOUND["fp32"], ROUNDING_FACTOR * rounding))


def _check_finite(logits: Tensor, source: Source) -> None:
    """Refuse a model whose tensors are finite and whose results are not: no parity can be measured on it."""
    bad = int((~torch.isfinite(logits)).sum())
    if bad:
        raise InputError(
            f"the dense model itself computes {bad} of {logits.numel()} logits that are NaN or infinite",
            where=source.name,
            fix="check the numbers in config.json (rope_theta, the factor of a scaling, the epsilon of the norms), and "
            "weights of extreme size",
        )


@torch.no_grad()
def dense_logits(
    source: Source, tokens: Tensor, peaks: Peaks | None = None, *, shaken: bool = False
) -> tuple[Tensor, float]:
    """Run tokens through a model, one layer in memory at a time; the logits are mapped.

    On request a second run has the output of every layer, and of every module in it, moved by noise of one float32
    step of its root mean square in each coordinate: what an exact computation in another basis may differ by.

    Args:
        source: The model.
        tokens: int64 (batch, length).
        peaks: Records the largest values of the exact run.
        shaken: Make the second run.

    Returns:
        Logits (batch, length, width), and the largest difference of the second run's over the largest logit (zero
        without one).
    """
    model = source.skeleton()
    source.load_rest(model)
    for path in source.description.outer_paths:
        settle(model.get_submodule(path), untouched=True)
    layers = cast(nn.ModuleList, model.get_submodule(source.architecture.layers))
    streams = Streams(model, layers, tokens)
    noise = torch.Generator().manual_seed(0)
    streams.start(_EXACT)
    if shaken:
        streams.hidden[_SHAKEN] = streams.hidden[_EXACT]
    if peaks is not None:
        peaks.note("the token embedding", streams.hidden[_EXACT])
    for index in track(range(source.layer_count), "running the dense model on the probe, layers"):
        layer = source.load_layer(model, index)
        with nullcontext() if peaks is None else peaks.recording(layer, f"layer {index}"):
            streams.advance(_EXACT, index)
        if shaken:
            with shaking_outputs(layer, noise):
                streams.hidden[_SHAKEN] = float32_step(streams.advance(_SHAKEN, index), noise)
        layer.to("meta")
        give_back()
    logits = laid_down(streams.finish(_EXACT).float())
    if peaks is not None:
        peaks.note("the output", logits)
    if not shaken:
        return logits, 0.0
    return logits, relative_error(logits.numpy(), streams.finish(_SHAKEN).float().numpy())
