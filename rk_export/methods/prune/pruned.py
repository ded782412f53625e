"""Whole blocks, FFN neurons and key/value heads that go before anything else; what is left is an ordinary model.

Every block that stays keeps as many neurons and heads as the others, so the model's config says it all: statistics,
plans, graphs and checkpoints see a smaller model of the same family. Widths that differ from block to block are
`Plan.shapes`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.layer_statistics import FromDense
from rk_export.errors import InputError
from rk_export.methods.prune.options import PruneOptions
from rk_export.model.decoder_spec import decoder_spec
from rk_export.model.families import empty_model
from rk_export.model.pruned_config import pruned_config
from rk_export.model.sites import canonical_layers, plain_sites
from rk_export.passes.base import Layer, SiteStatistics
from rk_export.passes.numerics.pruning import largest
from rk_export.passes.weights.prune_groups import group_scores
from rk_export.passes.weights.shapes import planned_shape, reshape_layer
from rk_export.plan import LayerShape, Pruning, SitePlan
from rk_export.report.records import Finding, Outcome
from rk_export.source.derived import DerivedSource
from rk_export.source.stored import ModelSource, loaded_layers

# Widths are rounded down to a multiple of it: kernels and quantization blocks take whole multiples.
WIDTH_MULTIPLE = 32


class PrunedSource(DerivedSource):
    """A model source without some structures; its layers are numbered anew.

    Args:
        source: The dense model.
        pruning: What stays.
        statistics: Of the dense model, to choose neurons and to make up for what goes; None judges by weights.
        device: Where that is computed.

    Raises:
        InputError: If the family cannot lose it.
    """

    def __init__(
        self,
        source: ModelSource,
        pruning: Pruning,
        statistics: DenseStatistics | None,
        device: torch.device,
    ) -> None:
        super().__init__(source)
        self.config = pruned_config(source.config, pruning)
        self.variant = f"{source.variant} {pruning}"
        self.pruning = self._kept = pruning
        self._statistics, self._device = statistics, device
        self._whole_models: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()
        self._findings: dict[int, list[Finding]] = {}

    @property
    def findings(self) -> tuple[Finding, ...]:  # type: ignore[override]
        """What the source says, the blocks that went, and what each layer lost; with errors once it was loaded."""
        lost = [
            finding
            for index in range(self.layer_count)
            for finding in self._findings.get(index) or self._planned(index)
        ]
        return (*super().findings, *self._gone_blocks(), *lost)

    def skeleton(self) -> PreTrainedModel:
        """Return the pruned model without weights."""
        return empty_model(self.config)

    def load_layer(self, model: PreTrainedModel, index: int) -> nn.Module:
        """Fill one layer of a skeleton with what stays of its block, in canonical form, and return it."""
        layer: nn.Module = model.get_submodule(f"{self.architecture.layers}.{index}")
        if not self._is_fresh(layer):
            return layer
        self.architecture.canonicalize(layer)
        blocks = self._whole_blocks(model)
        block = self._kept.blocks[index]
        empty = copy.deepcopy(blocks[block])
        whole = self._source.load_layer(self._whole_models[model], block)
        reduced, findings = self._reduced(whole, index, block)
        blocks[block] = empty
        for name, tensor in _tensors(reduced, self._paths(index)).items():
            owner, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        self._findings[index] = findings
        return layer

    def _whole_blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the blocks of the skeleton that is read for a pruned one."""
        if model not in self._whole_models:
            self._whole_models[model] = self._source.skeleton()
        return cast(nn.ModuleList, self._whole_models[model].get_submodule(self.architecture.layers))

    def _paths(self, index: int) -> list[str]:
        return [item.path for item in self.architecture.projections(self.config, index)]

    def _reduced(self, whole: nn.Module, index: int, block: int) -> tuple[Layer, list[Finding]]:
        layer = Layer(block, whole, self.architecture.heads(self._source.config).kv_heads)
        sites, known = _known(self._source, layer, self._statistics)
        layer, findings = reshape_layer(layer, self._shape(index), sites, known, self._device)
        return layer, self._renamed(findings, index)

    def _planned(self, index: int) -> list[Finding]:
        """Return what a layer loses as far as shapes alone tell it."""
        if self._shape(index) is None:
            return []
        layer = next(
            layer
            for layer in canonical_layers(self._source.config)
            if layer.index == self._kept.blocks[index]
        )
        sites, _ = _known(self._source, layer, None)
        return self._renamed(planned_shape(layer, self._shape(index), sites)[1], index)

    def _shape(self, index: int) -> LayerShape | None:
        block, width, groups = self._kept.blocks[index], self._kept.ffn_width, self._kept.kv_groups
        if width is None and not groups:
            return None
        return LayerShape(block, ffn_width=width, kv_groups=groups[index] if groups else None)

    def _renamed(self, findings: list[Finding], index: int) -> list[Finding]:
        """Return findings of a block under the number that it has now."""
        old, new = f"layers.{self._kept.blocks[index]}.", f"layers.{index}."
        return [replace(finding, target=new + finding.target.removeprefix(old)) for finding in findings]

    def _gone_blocks(self) -> list[Finding]:
        skeleton = empty_model(self._source.config).get_submodule(self.architecture.layers)
        return [
            Finding(
                f"pruned.block_{number}",
                Outcome.APPLIED,
                bytes_before=4 * sum(item.numel() for item in block.parameters()),
                details={"pass": "prune-blocks"},
            )
            for number, block in enumerate(skeleton.children())
            if number not in self._kept.blocks
        ]


def _known(
    source: ModelSource, layer: Layer, statistics: DenseStatistics | None
) -> tuple[list[SitePlan], Mapping[str, SiteStatistics]]:
    """Return a dense layer's matrices as sites, and what is known about them."""
    sites = plain_sites(layer, source.architecture.projections(source.config, layer.index))
    return sites, {} if statistics is None else FromDense(statistics).of_sites(layer, sites)


def _tensors(layer: Layer, paths: list[str]) -> dict[str, Tensor]:
    """Return a layer's tensors by their names in an ordinary one: matrices without the padding of pruned heads."""
    inside = tuple(f"{path}." for path in paths)
    tensors = {
        name: tensor.data for name, tensor in layer.module.named_parameters() if not name.startswith(inside)
    }
    for path in paths:
        linear = layer.linear(path)
        tensors[f"{path}.weight"] = linear.weight.data
        if linear.bias is not None:
            tensors[f"{path}.bias"] = linear.bias.data
    return tensors


def chosen_pruning(
    source: ModelSource,
    options: PruneOptions,
    influence: list[float],
    statistics: DenseStatistics | None,
) -> Pruning:
    """Decide what stays.

    Args:
        source: The dense model.
        options: How much goes.
        influence: Of each block, from `block_influence`; the least go.
        statistics: Of the dense model, to score key/value heads; None judges them by weights.

    Raises:
        InputError: If nothing would be left.
    """
    count = source.layer_count
    check_blocks(count, options)
    blocks = tuple(sorted(sorted(range(count), key=lambda block: influence[block])[options.blocks :]))
    groups: tuple[tuple[int, ...], ...] = ()
    if (wanted := options.kv_groups) is not None:
        scores = [
            group_scores(layer, *_known(source, layer, statistics))
            for layer in loaded_layers(source)
            if layer.index in blocks
        ]
        groups = tuple(tuple(largest(score, min(wanted, len(score))).tolist()) for score in scores)
    return Pruning(blocks, kept_width(source, options.ffn), groups)


def check_blocks(count: int, options: PruneOptions) -> None:
    """Refuse to drop every block.

    Raises:
        InputError: If none would be left.
    """
    if options.blocks >= count:
        raise InputError(
            f"{options.blocks} of {count} blocks", where="--prune-blocks", fix=f"drop at most {count - 1}"
        )


def kept_width(source: ModelSource, share: float) -> int | None:
    """Return the neurons of every MLP that stay at a share, None for all of them.

    Raises:
        InputError: If the share leaves nothing.
    """
    if share == 1:
        return None
    present = decoder_spec(source.config).intermediate_size
    width = int(share * present) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    if width == 0:
        raise InputError(
            f"{share:g} of {present} neurons is less than {WIDTH_MULTIPLE}",
            where="--prune-ffn",
            fix="give a larger share",
        )
    return width
