"""Exact reparameterizations of a dense model: made layer by layer as it is read, or saved as a plain model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.errors import InputError
from rk_export.folders import AtomicFolder
from rk_export.manifest import write_manifest
from rk_export.matrix_id import MatrixId
from rk_export.model.description import ModelDescription
from rk_export.model.layer_wiring import wiring_of
from rk_export.model.plain_form import plain_model
from rk_export.model.preparable import check_scale, folded_norms, preparations_of
from rk_export.options.prepare import PREPARATIONS
from rk_export.passes.modules.quantized import RotatedHead
from rk_export.passes.prepare.fold import fold_layer, fold_norm
from rk_export.passes.prepare.heads import rotate_heads
from rk_export.passes.prepare.orthogonal import Orthogonal, orthogonal
from rk_export.passes.prepare.rotate import rotate_layer, rotate_reader, rotated_tied_head
from rk_export.passes.prepare.scale import scale_layer
from rk_export.passes.prepare.wiring import Wiring
from rk_export.report.records import Finding
from rk_export.source.protocol import Source
from rk_export.source.quiet import transformers_quiet
from rk_export.source.side_files import write_side_files
from rk_export.source.stored import StoredModel
from rk_export.source.transformed import Transform


@dataclass(frozen=True)
class LayerPreparation:
    """How the layers of one model are reparameterized.

    Args:
        description: Of the model.
        names: The preparations, names from `rk_export.options.prepare.PREPARATIONS` or a part of `fold`.
        seed: Of the rotations.
        peaks: As in `Prepared`.
        alpha: As in `Prepared`.
    """

    description: ModelDescription
    names: tuple[str, ...]
    seed: int
    peaks: Mapping[str, Tensor]
    alpha: float

    @property
    def variant(self) -> str:
        """Tells preparations that give other tensors apart; empty where nothing is done."""
        peaks = hashlib.sha256()
        for name, peak in sorted(self.peaks.items()):
            peaks.update(name.encode() + peak.float().cpu().numpy().tobytes())
        return f"{self.names} {self.seed} {self.alpha} {peaks.hexdigest()}" if self.names else ""

    @cached_property
    def rotation(self) -> Orthogonal:
        """The rotation of the residual stream."""
        return orthogonal(self.description.config.hidden_size, torch.Generator().manual_seed(self.seed))

    def head_rotations(self, index: int, kv_heads: int) -> list[Orthogonal]:
        """Return the rotation of each KV head's values in layer `index`."""
        generator = torch.Generator().manual_seed(self.seed + 1 + index)
        return [orthogonal(self.description.heads.head_dim, generator) for _ in range(kv_heads)]

    def peaks_of(self, index: int, down: str) -> Tensor:
        """Return the peaks of what a down matrix of layer `index` reads (neurons,)."""
        return self.peaks[MatrixId(index, down).name]

    def apply(self, layer: nn.Module, wiring: Wiring, index: int, names: Collection[str]) -> None:
        """Reparameterize a layer in place by some of the preparations."""
        fold_layer(layer, wiring, folded_norms(wiring, names))
        if "rotate" in names:
            rotate_layer(layer, wiring, self.rotation)
        if "rotate-heads" in names:
            rotate_heads(layer, wiring, self.head_rotations(index, wiring.kv_heads))
        if "scale" in names:
            peaks = {down: self.peaks_of(index, down) for _, down in wiring.mlps}
            scale_layer(layer, wiring, peaks, self.alpha)


class Prepared(Transform):
    """Exact reparameterizations: logits stay the same.

    A rotated model whose head is tied to its embedding gets a `RotatedHead` in place of its output projection.

    Args:
        description: Of the model.
        names: Names from `rk_export.options.prepare.PREPARATIONS`; those that the family cannot take are left out.
        seed: Of the rotations.
        peaks: For `scale`: name of a down matrix (`layers.3.mlp.down_proj`, paths of canonical layers) -> the
            largest absolute input of each of its neurons, (intermediate,).
        alpha: For `scale`: how far peaks are evened out, from 0 to 1.

    Raises:
        InputError: If the names do not go together, or peaks are missing or do not fit.
    """

    def __init__(
        self,
        description: ModelDescription,
        names: Sequence[str],
        *,
        seed: int = 0,
        peaks: Mapping[str, Tensor] | None = None,
        alpha: float = 0.25,
    ) -> None:
        self._description = description
        self._preparations = preparations_of(description, names)
        self._layers = LayerPreparation(description, self.names, seed, peaks or {}, alpha)
        self.variant = self._layers.variant
        if "scale" in self.names:
            check_scale(description, peaks or {}, alpha)

    @property
    def names(self) -> tuple[str, ...]:
        """The preparations that apply, in their order."""
        return self._preparations.names

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One per preparation: applied, or skipped with the reason; and one per part that is left out."""
        return self._preparations.findings

    def check(self, earlier: tuple[Transform, ...]) -> None:
        """Refuse a model that is prepared.

        Raises:
            InputError: Says so.
        """
        if any(isinstance(transform, Prepared) for transform in earlier):
            raise InputError("is prepared already", where="prepare", fix="name all preparations at once")

    def layer(self, layer: nn.Module, index: int) -> nn.Module:
        """Reparameterize a layer."""
        if self.names:
            self._layers.apply(layer, wiring_of(self._description, index), index, self.names)
        return layer

    def rest(self, model: PreTrainedModel) -> None:
        """Reparameterize embeddings, final norm and lm_head."""
        if not self.names:
            return
        architecture, rotation = self._description.architecture, self._layers.rotation
        embedding = cast(nn.Embedding, model.get_submodule(architecture.embedding))
        path = cast(str, architecture.lm_head)
        norm, head = model.get_submodule(self._final_norm_path), model.get_submodule(path)
        if self._preparations.final_norm == "folded":
            fold_norm(norm, [head], unit_offset=architecture.unit_offset)
        if "rotate" not in self.names:
            return
        rotate_reader(embedding, rotation)
        if self._preparations.final_norm == "rotated head":
            rotated = rotated_tied_head(norm, embedding, rotation, unit_offset=architecture.unit_offset)
            model.set_submodule(path, rotated)
        else:
            rotate_reader(head, rotation)

    @property
    def _final_norm_path(self) -> str:
        outer = self._description.architecture.outer
        return next(path for path, onnx in outer.items() if onnx == "model.norm")


def save_prepared(
    source: StoredModel,
    names: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    peaks: Mapping[str, Tensor] | None = None,
    alpha: float = 0.25,
    force: bool = False,
) -> tuple[Finding, ...]:
    """Write a reparameterized model as a plain Hugging Face folder in float32.

    A plain model has no place for the rotation of a tied head: there the head gets a matrix of its own and the
    config says `tie_word_embeddings: false`.

    Args:
        source: The dense model.
        names: As in `Prepared`, and so are `seed`, `peaks` and `alpha`.
        folder: The output folder.
        seed: Of the rotations.
        peaks: Peaks of the inputs of down.
        alpha: How far peaks are evened out.
        force: Replace a folder that rk-export wrote.

    Returns:
        The findings: what was applied, and what was not and why.

    Raises:
        InputError: If no preparation applies, the folder exists and `force` is off, or the disk is full.
    """
    change = Prepared(source.description, names, seed=seed, peaks=peaks, alpha=alpha)
    prepared = source.then(change)
    if not change.names:
        reasons = "; ".join(dict.fromkeys(finding.reason for finding in prepared.findings if finding.reason))
        fix = f"choose among {', '.join(PREPARATIONS)} what this family can take"
        raise InputError(
            f"nothing to prepare: {reasons or 'no preparation was named'}",
            where=source.name,
            fix="compress the model as it is" if source.architecture.is_encoder else fix,
        )
    with AtomicFolder(folder, force=force) as partial:
        plain = plain_model(_with_plain_head(prepared.load(), prepared))
        with transformers_quiet():
            plain.save_pretrained(partial)
        write_side_files(partial, source=source.folder, config=plain.config, generation_from=source.origin[1])
        write_manifest(
            partial,
            {
                "model": source.title,
                "model_type": source.config.model_type,
                "prepare": {"names": change.names, "seed": seed, "alpha": alpha},
            },
        )
    return prepared.findings


def _with_plain_head(model: PreTrainedModel, prepared: Source) -> PreTrainedModel:
    """Merge the rotation of a tied head into a matrix of the head's own, in place."""
    path = cast(str, prepared.architecture.lm_head)
    head = model.get_submodule(path)
    if isinstance(head, RotatedHead):
        table, rotation = (cast(nn.Linear, part) for part in (head.head, head.rotation))
        merged = nn.Linear(table.in_features, table.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(table.weight @ rotation.weight, requires_grad=False)
        model.set_submodule(path, merged)
        model.config.tie_word_embeddings = False
    return model
