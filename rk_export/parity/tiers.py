"""Parity as a contract: each step from the model's files to the running bundle is compared on its own.

| tier | reference | candidate | a difference means |
| --- | --- | --- | --- |
| 0 | transformers | PyTorch dense, as we read it | a fault of our loading |
| p | PyTorch dense | PyTorch prepared | a reparameterization that is not exact |
| a | PyTorch prepared | PyTorch factorized | error of the factorization |
| b | PyTorch factorized | PyTorch quantized | error of the quantization |
| c | PyTorch quantized | ONNX Runtime, accuracy level 0 | a fault of the export or the runtime |
| d | ONNX Runtime, level 0 | ONNX Runtime as shipped | int8 activations (level 4, W8A8) |
| e | prefill | cached decode | a fault of the cache |
| f | single rows | left-padded batch | a fault of the padding |
| g | greedy tokens of PyTorch | greedy tokens of ONNX Runtime | a visible difference |
| h | single rows, as shipped | left-padded batch, as shipped | other rounding of int8 inputs |
| i | single requests, as shipped | many at once, as shipped | an answer that depends on its neighbours |
| s | vectors of single texts in PyTorch | those of a padded batch, level 0 | a fault of the pooling |

Rounding to int8 tells apart inputs that differ by 1e-7, so two exact computations of a W8A8 model may differ by a
good part of what its rounding costs (a tiny random GPT-2: a tenth). Tiers c, e, f and g therefore read those inputs in
floats on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rk_export.model.computed_in import computing_in
from rk_export.model.torch_logits import torch_logits
from rk_export.parity.comparison import FLOAT_BOUND, compare, held_to, not_measured, relative_error
from rk_export.parity.float_steps import ROUNDING_FACTOR, shaking_outputs
from rk_export.parity.greedy import Golden, greedy_tier, greedy_tokens, stored_greedy_tier
from rk_export.parity.preflight import ORACLE_TIER, Preflight
from rk_export.parity.probe import Probe
from rk_export.parity.sentence_tier import sentence_tier
from rk_export.parity.session_tiers import (
    LEVEL_TIER,
    encoder_output,
    encoder_padding_tier,
    session_tiers,
    shipped_padding_tier,
)
from rk_export.parity.slots_tier import slots_tier
from rk_export.passes.modules.quantized import Int8Linear, QuantizedLinear, float_inputs, level4_inputs
from rk_export.progress import Bar, stage
from rk_export.report.records import Outcome, ParityTier
from rk_export.rewrite.apply import DENSE, FACTORIZED, QUANTIZED, Rewritten
from rk_export.runtime import EncoderSession, Session
from rk_export.runtime.providers import Provider
from rk_export.scratch import laid_down
from rk_export.source.sentence_head import SentenceHead

# Some models lose more than the common bound whoever computes: in half precision SmolLM2-135M (1.4e-2 in PyTorch, for
# its activations reach the thousands), in single precision models whose massive activations cancel. A graph may then
# lose twice what PyTorch's own arithmetic of that precision loses.
OWN_PRECISION_FACTOR = 2.0
# One draw of float32's rounding says little where few positions lose much: four times as much was seen in another. So
# it is drawn that often, beside the difference from float64.
SHAKES = 4
# What int8 inputs cost is emulated in PyTorch; where rounding falls to the other side, the largest error moves.
LEVEL_FACTOR = 2.0
# From here on, int8 inputs are named as what they are: too coarse for this model.
COARSE = 0.5

_PREPARED, _FACTORIZED = "PyTorch dense vs prepared", "PyTorch prepared vs factorized"
_QUANTIZED = "PyTorch factorized vs quantized"
_RUNTIME = "PyTorch quantized vs ONNX Runtime, level 0"
_PREPARE = "prepare."
_CHECKPOINT = "a compressed checkpoint holds no dense model"


def method_tiers(rewritten: Rewritten, before: Preflight) -> Iterator[ParityTier]:
    """Yield tiers 0, p, a and b: what was read, and what the rewriting did to it.

    Args:
        rewritten: With the logits that the rewriting carried along.
        before: The untouched dense model on the same prompts.
    """
    logits = {version: tensor.float().numpy() for version, tensor in rewritten.probe_logits.items()}
    yield before.tier
    names = [
        finding.target.removeprefix(_PREPARE)
        for finding in rewritten.findings
        if finding.target.startswith(_PREPARE) and finding.outcome is Outcome.APPLIED
    ]
    yield prepared_tier(before, logits[DENSE], names)
    prompts = before.probe.prompts
    note = f"{len(prompts)} prompts of {len(prompts[0])} tokens"
    yield compare("a", _FACTORIZED, logits[DENSE], logits[FACTORIZED], bound=None, note=note)
    yield compare("b", _QUANTIZED, logits[FACTORIZED], logits[QUANTIZED], bound=None, note=note)


def prepared_tier(before: Preflight, logits: np.ndarray, names: Sequence[str]) -> ParityTier:
    """Return tier p: the untouched dense model against the reparameterized one.

    Args:
        before: The untouched dense model on the probe.
        logits: Of the prepared model on the same prompts.
        names: The reparameterizations that were applied.
    """
    bound = max(FLOAT_BOUND["fp32"], ROUNDING_FACTOR * before.rounding)
    step = f"float32 steps move the logits by {before.rounding:.2g}"
    note = f"{', '.join(names)}; {step}" if names else "nothing was prepared"
    return compare("p", _PREPARED, before.logits.numpy(), logits, bound=bound, note=note)


def checkpoint_tiers() -> Iterator[ParityTier]:
    """Yield tiers 0, p, a and b of a model that came from a compressed checkpoint: none can be measured."""
    names = {"0": ORACLE_TIER, "p": _PREPARED, "a": _FACTORIZED, "b": _QUANTIZED}
    for tier, name in names.items():
        yield not_measured(tier, name, _CHECKPOINT)


def unrepeated_tiers(tiers: str, why: str) -> Iterator[ParityTier]:
    """Yield tiers, by their letters, that cannot be measured again, with the reason."""
    names = {"p": _PREPARED, "a": _FACTORIZED, "b": _QUANTIZED, "c": _RUNTIME}
    for tier in tiers:
        yield not_measured(tier, names[tier], why)


def runtime_tiers(
    bundle: Path,
    rewritten: Rewritten,
    probe: Probe,
    *,
    head: SentenceHead | None = None,
    provider: Provider = "auto",
    threads: int | None = None,
) -> tuple[tuple[ParityTier, ...], Golden | None]:
    """Compare a bundle with the PyTorch model it was exported from: tiers c to i, or c, d, f and s of an encoder.

    Returns:
        The tiers, and the greedy tokens of tier g (None for an encoder).
    """
    if rewritten.architecture.is_encoder:
        return _encoder_tiers(bundle, rewritten, probe, head, provider, threads), None
    with stage("parity, tiers", len("cdefghi")) as bar:
        return _decoder_tiers(bundle, rewritten, probe, provider, threads, bar)


def _encoder_tiers(
    bundle: Path,
    rewritten: Rewritten,
    probe: Probe,
    head: SentenceHead | None,
    provider: Provider,
    threads: int | None,
) -> tuple[ParityTier, ...]:
    """Return tiers c, d and f of an encoder, and s where its graph makes vectors of texts."""
    reference = float_reference(rewritten, probe)
    encoder = EncoderSession.from_pretrained(bundle, provider=provider, threads=threads, accuracy_level=0)
    states = encoder_output(encoder, probe.batch)
    computed = compare("c", _RUNTIME, reference, states, bound=None)
    padding = rewritten.description.config.pad_token_id or 0
    padded = encoder_padding_tier(encoder, probe, bound=None, padding=padding)
    vectors = [] if head is None else [sentence_tier(encoder, rewritten, head, probe)]
    worst = max(tier.relative_error or 0 for tier in (computed, padded, *vectors))
    bound, note = runtime_bound(rewritten, probe, worst)
    exact = [held_to(tier, bound) for tier in (replace(computed, note=note), padded, *vectors)]
    del encoder
    shipped = EncoderSession.from_pretrained(bundle, provider=provider, threads=threads)
    rounded = encoder_output(shipped, probe.batch)
    level = compare("d", LEVEL_TIER, states, rounded, bound=None)
    level_bound, level_note = shipped_bound(rewritten, probe, reference, bound, (states, rounded))
    exact.insert(1, replace(held_to(level, level_bound), note=level_note))
    return tuple(exact)


def _decoder_tiers(
    bundle: Path, rewritten: Rewritten, probe: Probe, provider: Provider, threads: int | None, bar: Bar
) -> tuple[tuple[ParityTier, ...], Golden]:
    """Return tiers c to i of a decoder, and the greedy tokens of tier g."""
    reference = float_reference(rewritten, probe)
    exact = Session.from_pretrained(bundle, provider=provider, threads=threads, accuracy_level=0)
    logits = _kept_logits(exact, probe)
    measured = [compare("c", _RUNTIME, reference, logits, bound=None)]
    bar.advance()
    for tier in session_tiers(exact, probe, logits, bound=None):
        measured.append(tier)
        bar.advance()
    error = max(tier.relative_error or 0 for tier in measured)
    bound, note = runtime_bound(rewritten, probe, error)
    tiers = [held_to(tier, bound) for tier in measured]
    tiers[0] = replace(tiers[0], note=note)
    tokens = greedy_tokens(exact, probe)
    del exact
    shipped = Session.from_pretrained(bundle, provider=provider, threads=threads)
    rounded = shipped.prefill_logits(probe.batch)
    level = compare("d", LEVEL_TIER, logits, rounded, bound=None)
    level_bound, level_note = shipped_bound(rewritten, probe, reference, bound, (logits, rounded))
    tiers.insert(1, replace(held_to(level, level_bound), note=level_note))
    bar.advance()
    # Elsewhere other inputs fall to the other side.
    golden = Golden(probe, tokens, bound, max(level_bound, LEVEL_FACTOR * (level.relative_error or 0.0)))
    tiers.append(greedy_tier(rewritten, golden, error))
    bar.advance()
    for measure in (shipped_padding_tier, slots_tier):
        tiers.append(measure(shipped, probe))
        bar.advance()
    return tuple(tiers), golden


def _kept_logits(session: Session, probe: Probe) -> np.ndarray:
    """Return a bundle's logits of the prompts, mapped: several tiers read them."""
    return np.asarray(laid_down(torch.from_numpy(session.prefill_logits(probe.batch))).numpy())


def float_reference(rewritten: Rewritten, probe: Probe) -> np.ndarray:
    """Return the quantized model's logits of the probe, all inputs in floats as at accuracy level 0."""
    if not _has(rewritten, Int8Linear):
        return np.asarray(rewritten.probe_logits[QUANTIZED].float().numpy())
    with float_inputs(rewritten.model):
        return np.asarray(laid_down(torch_logits(rewritten.model)(probe.batch).float()).numpy())


def shipped_bound(
    rewritten: Rewritten,
    probe: Probe,
    reference: np.ndarray,
    bound: float,
    runtime: tuple[np.ndarray, np.ndarray],
) -> tuple[float, str]:
    """Return the bound of tier d as a relative error, and what it comes from.

    Rounding inputs to int8 costs what it costs; PyTorch emulates it, and the runtime may lose twice as much. The
    largest error is that of one position, and depends on which of its inputs fall to the other side:
    Qwen2.5-Coder-0.5B lost 2 % in one run and 6 % in another. So where it is larger, the root mean square over all
    positions decides.

    Args:
        rewritten: The quantized model.
        probe: The prompts.
        reference: Its logits of them with all inputs in floats.
        bound: What exact computations may differ by.
        runtime: Logits of the runtime at level 0, and as shipped.
    """
    level = rewritten.plan.recipe.target.accuracy_level
    with level4_inputs(rewritten.model) if level == 4 else nullcontext():
        emulated = torch_logits(rewritten.model)(probe.batch).float().numpy()
    lost = relative_error(reference, emulated)
    if lost == 0:
        return bound, "no inputs are rounded to int8"
    note = f"PyTorch's own int8 inputs differ from floats by {lost:.2g}"
    if lost > COARSE:
        note += f"; {_remedy(rewritten)}"
    error = relative_error(*runtime)
    if error > max(bound, LEVEL_FACTOR * lost):
        here, there = _root_mean_square(*runtime), _root_mean_square(reference, emulated)
        note += f"; in the root mean square the runtime's error is {here / there:.2f} times PyTorch's"
        if here <= LEVEL_FACTOR * there:
            return error, note
    return max(bound, LEVEL_FACTOR * lost), note


def _root_mean_square(one: np.ndarray, other: np.ndarray) -> float:
    """Return the root mean square of a difference, a prompt at a time."""
    squares = [float(np.square(a - b, dtype=np.float64).mean()) for a, b in zip(one, other, strict=True)]
    return float(np.sqrt(np.mean(squares)))


def _remedy(rewritten: Rewritten) -> str:
    coarse = "that is too coarse for this model"
    return (
        f"{coarse}: target.accuracy_level 0 computes in floats"
        if _has(rewritten, QuantizedLinear)
        else coarse
    )


def _has(rewritten: Rewritten, kind: type[torch.nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in rewritten.model.modules())


@torch.no_grad()
def runtime_bound(rewritten: Rewritten, probe: Probe, error: float = 0.0) -> tuple[float, str]:
    """Return the bound of tiers c, e and f as a relative error, and a note where it is not the common one.

    Args:
        rewritten: The quantized model.
        probe: The prompts.
        error: What was found; in fp32 a bound of this model's own is looked for only where the common one is broken.
    """
    float_dtype = rewritten.plan.recipe.target.float_dtype
    common = FLOAT_BOUND[float_dtype]
    if float_dtype == "fp32" and error <= common:
        return common, ""
    reference = float_reference(rewritten, probe)
    model = rewritten.model
    if float_dtype == "fp16":
        with computing_in(model, torch.float16):
            lost = _moved(model, probe, reference)
        return _own_bound(common, lost, "PyTorch's own fp16 differs from fp32")
    with computing_in(model, torch.float64):
        exact = _moved(model, probe, reference)
    lost = max(exact, *(_moved(model, probe, reference, shaken_by=seed) for seed in range(SHAKES)))
    return _own_bound(common, lost, "float32 steps in PyTorch's own computation move the logits")


def _own_bound(common: float, lost: float, what: str) -> tuple[float, str]:
    return max(common, OWN_PRECISION_FACTOR * lost), f"{what} by {lost:.2g}"


def _moved(
    model: torch.nn.Module, probe: Probe, reference: np.ndarray, shaken_by: int | None = None
) -> float:
    """Return the relative error of a model's logits against the reference; a seed shakes its modules' outputs."""
    seed = None if shaken_by is None else torch.Generator().manual_seed(shaken_by)
    with float_inputs(model), nullcontext() if seed is None else shaking_outputs(model, seed):
        return relative_error(reference, torch_logits(model)(probe.batch).float().numpy())


def bundle_tiers(
    bundle: Path, golden: Golden, float_dtype: str, *, provider: Provider = "auto", threads: int | None = None
) -> tuple[ParityTier, ...]:
    """Verify a decoder bundle on its own: tiers d, e, f, h and i, and g against the tokens that travel with it."""
    probe = golden.probe
    with stage("parity, tiers", len("defghi")) as bar:
        exact = Session.from_pretrained(bundle, provider=provider, threads=threads, accuracy_level=0)
        logits = _kept_logits(exact, probe)
        tiers = []
        for tier in session_tiers(exact, probe, logits, golden.bound):
            tiers.append(tier)
            bar.advance()
        tiers.append(stored_greedy_tier(golden, greedy_tokens(exact, probe), float_dtype))
        bar.advance()
        del exact
        shipped = Session.from_pretrained(bundle, provider=provider, threads=threads)
        rounded = shipped.prefill_logits(probe.batch)
        level = compare("d", LEVEL_TIER, logits, rounded, bound=golden.level_bound)
        bar.advance()
        tiers.append(shipped_padding_tier(shipped, probe))
        bar.advance()
        return (level, *tiers, slots_tier(shipped, probe))
