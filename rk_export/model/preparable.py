"""Which exact reparameterizations a model takes, why not the others, and which matrices they touch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.description import ModelDescription
from rk_export.model.layer_wiring import wiring_of
from rk_export.options.prepare import PARTS_OF_FOLD, PREPARATIONS
from rk_export.passes.prepare.wiring import Wiring
from rk_export.report.records import Finding, Outcome

# f(s x) = s f(x) for s > 0.
HOMOGENEOUS_ACTIVATIONS = ("relu",)


@dataclass(frozen=True)
class Preparations:
    """What is done to one model.

    Args:
        names: The preparations that apply, in their order.
        final_norm: Where the final norm's gain goes: it is kept, folded into the head's own matrix, or moved
            into the d x d rotation in front of a tied head.
        findings: One per preparation that was asked for, and one per part that is left out.
    """

    names: tuple[str, ...]
    final_norm: Literal["kept", "folded", "rotated head"]
    findings: tuple[Finding, ...]


def preparations_of(description: ModelDescription, names: Sequence[str]) -> Preparations:
    """Decide, from a model's structure alone, which preparations apply.

    Raises:
        InputError: If a name is unknown, or `rotate` is asked for without `fold`.
        UnsupportedModelError: If the family is unknown.
    """
    check_names(names)
    wanted = [name for name in (*PARTS_OF_FOLD, *PREPARATIONS) if name in names]
    reasons = {name: _reason(description, name) for name in wanted}
    applied = tuple(name for name, reason in reasons.items() if not reason)
    final, kept = _final_norm(description, applied)
    findings = [_finding(f"prepare.{name}", reason) for name, reason in reasons.items()]
    if "fold" in applied and kept:
        findings.append(_finding("prepare.fold.final_norm", kept))
    if final == "rotated head":
        size = description.config.hidden_size**2 * 4
        details = {"pass": "prepare", "rotation": description.config.hidden_size}
        findings.append(
            Finding("lm_head.rotation", Outcome.APPLIED, bytes_before=0, bytes_after=size, details=details)
        )
    return Preparations(applied, final, tuple(findings))


def check_names(names: Iterable[str]) -> None:
    """Refuse names that do not exist or do not go together.

    Raises:
        InputError: Names the option and the fix.
    """
    if unknown := set(names) - {*PREPARATIONS, *PARTS_OF_FOLD}:
        raise InputError(
            f"unknown preparation {min(unknown)!r}",
            where="prepare",
            fix=f"choose from {', '.join((*PREPARATIONS, *PARTS_OF_FOLD))}",
        )
    if "rotate" in names and "fold" not in names:
        raise InputError(
            "a norm commutes with a rotation only without its gain",
            where="prepare",
            fix="add fold to rotate",
        )


def check_scale(description: ModelDescription, peaks: Mapping[str, Tensor], alpha: float) -> None:
    """Refuse what `scale` cannot work with.

    Args:
        description: Of the model.
        peaks: Name of a down matrix (`layers.3.mlp.down_proj`) -> the largest input of each neuron.
        alpha: How far peaks are evened out.

    Raises:
        InputError: If alpha is out of range, or a down matrix has no peaks or others than one a neuron.
    """
    if not 0 <= alpha <= 1:
        raise InputError(
            f"an alpha of {alpha} is out of range", where="scale", fix="give a number from 0 to 1"
        )
    for layer in description.layers():
        for _, down in wiring_of(description, layer.index).mlps:
            name = MatrixId(layer.index, down).name
            _check_peaks(peaks.get(name), layer.linear(down).in_features, name)


def _check_peaks(peaks: Tensor | None, neurons: int, name: str) -> None:
    if peaks is None:
        raise InputError(
            f"the peaks of {name!r} are missing",
            where="scale",
            fix="measure the largest input of every down matrix",
        )
    fitting = peaks.shape == (neurons,) and bool(torch.isfinite(peaks).all() and (peaks >= 0).all())
    if not fitting:
        raise InputError(
            f"the peaks of {name!r} are not {neurons} finite numbers of at least 0",
            where="scale",
            fix="measure the largest input of every down matrix",
        )


def has_rotated_head(description: ModelDescription, names: Sequence[str]) -> bool:
    """Whether a prepared model has `RotatedHead` where its output projection stood."""
    return bool(names) and preparations_of(description, names).final_norm == "rotated head"


def folded_norms(wiring: Wiring, names: Collection[str]) -> tuple[str, ...]:
    """Return the paths of the norms of a layer that some preparations fold into what reads them."""
    wanted = {"fold-attention": True, "fold-mlp": False}
    kinds = {kind for name, kind in wanted.items() if name in names or "fold" in names}
    return tuple(norm for norm, paths in wiring.norms.items() if (wiring.mixes[0] in paths) in kinds)


def _reason(description: ModelDescription, name: str) -> str:
    """Return why a preparation does not apply, or an empty string."""
    family = description.model_type
    if description.architecture.is_encoder:
        return f"{family} is an encoder: reparameterizations are made for decoders"
    spec = description.decoder
    if name in PARTS_OF_FOLD:
        names = spec.norm_names
        if not (names.before_attention if name == "fold-attention" else names.before_mlp):
            return f"the norms of {family} follow its blocks: no matrix reads a norm alone"
    if name == "fold" or name in PARTS_OF_FOLD:
        return _no_fold(description, spec)
    if name == "rotate":
        return _no_rotation(family, spec)
    if name == "rotate-heads" and spec.on_values:
        return f"{spec.on_values} stands between the values of {family} and its output projection"
    if name == "scale" and spec.on_neurons:
        return f"{spec.on_neurons} stands between the neurons of {family} and its down matrix"
    if name == "scale" and not spec.gated_mlp and spec.activation not in HOMOGENEOUS_ACTIVATIONS:
        return f"the MLP of {family} has no gate, and {spec.activation} of a scaled input is not the scaled output"
    return ""


def _no_fold(description: ModelDescription, spec: DecoderSpec) -> str:
    if not any((spec.norm_names.before_attention, spec.norm_names.before_mlp)) and spec.tied:
        return (
            f"the norms of {description.model_type} follow its blocks, and its head is tied to the embedding: no "
            "matrix reads a norm alone"
        )
    if spec.norm == "layer_plain":
        return f"the norms of {description.model_type} have no gain"
    if spec.norm == "layer" and not _readers_have_biases(description):
        return f"LayerNorm shifts its output, and the matrices of this {description.model_type} model have no biases"
    return ""


def _no_rotation(family: str, spec: DecoderSpec) -> str:
    if spec.norm != "rms":
        return (
            f"the LayerNorm of {family} subtracts the mean over the coordinates, which no rotation preserves"
        )
    if spec.norm_names.after_attention or spec.norm_names.after_mlp:
        return f"{family} has norms with gains behind its blocks, which do not commute with a rotation"
    return ""


def _readers_have_biases(description: ModelDescription) -> bool:
    readers, layer = wiring_of(description, 0).readers, description.layer(0)
    return all(getattr(layer.get_submodule(path), "bias", None) is not None for path in readers)


def _head_has_bias(description: ModelDescription) -> bool:
    path = description.architecture.lm_head
    return path is not None and description.canonical.get_submodule(path).bias is not None


def _final_norm(
    description: ModelDescription, applied: Sequence[str]
) -> tuple[Literal["kept", "folded", "rotated head"], str]:
    """Return where the final norm's gain goes, and why it stays if it does."""
    if "fold" not in applied:
        return "kept", ""
    spec = description.decoder
    if "rotate" in applied:
        return ("rotated head" if spec.tied else "folded"), ""
    if spec.tied:
        return "kept", "the head is tied to the embedding, which must not take the final norm's gain"
    if spec.norm == "layer" and not _head_has_bias(description):
        return "kept", "the head has no bias that could take the final norm's shift"
    return "folded", ""


def _finding(target: str, reason: str) -> Finding:
    if reason:
        return Finding(target, Outcome.SKIPPED, reason=reason)
    return Finding(target, Outcome.APPLIED, details={"pass": "prepare"})
