"""Whole blocks, FFN neurons and key/value heads that go before anything else; what is left is an ordinary model.

Every block that stays keeps as many neurons and heads as the others, so the model's config says it all: statistics,
plans, graphs and checkpoints see a smaller model of the same family. Widths that differ from block to block are
`Plan.shapes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.layer_statistics import FromDense
from rk_export.errors import InputError
from rk_export.methods.prune.options import PruneOptions
from rk_export.model.description import ModelDescription
from rk_export.model.pruned_description import pruned_description
from rk_export.model.sites import plain_sites
from rk_export.model.torch_models import stored_buffers
from rk_export.passes.base import Layer
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.pruning import largest
from rk_export.passes.weights.prune_groups import group_scores
from rk_export.passes.weights.shapes import planned_shape, reshape_layer
from rk_export.plan import LayerShape, Pruning, SitePlan
from rk_export.report.records import Finding, Outcome
from rk_export.source.protocol import Source
from rk_export.source.transformed import Transform

# Widths are rounded down to a multiple of it: kernels and quantization blocks take whole multiples.
WIDTH_MULTIPLE = 32


class Pruned(Transform):
    """Whole structures left out; the layers that stay are numbered anew.

    Args:
        description: Of the model.
        pruning: What stays.
        statistics: Of the model, to choose neurons and to make up for what goes; None judges by weights.
        device: Where that is computed.

    Raises:
        InputError: If the family cannot lose it.
    """

    def __init__(
        self,
        description: ModelDescription,
        pruning: Pruning,
        statistics: DenseStatistics | None,
        device: torch.device,
    ) -> None:
        self._before, self._after = description, pruned_description(description, pruning)
        self.variant, self.pruning = str(pruning), pruning
        self._kept = pruning
        self._statistics, self._device = statistics, device
        self._findings: dict[int, list[Finding]] = {}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The blocks that went, and what each layer lost; with errors once it was loaded."""
        lost = [
            finding
            for index in range(self._after.layer_count)
            for finding in self._findings.get(index) or self._planned(index)
        ]
        return (*self._gone_blocks(), *lost)

    def description(self, before: ModelDescription) -> ModelDescription:
        """Return what is left."""
        return self._after

    def block(self, index: int) -> int:
        """Return the block that a layer was."""
        return self._kept.blocks[index]

    def layer(self, layer: nn.Module, index: int) -> nn.Module:
        """Return what stays of a block, as an ordinary layer of the smaller model."""
        block = Layer(self.block(index), layer, self._before.heads.kv_heads)
        sites, known = _known(self._before, block, self._statistics)
        reduced, findings = reshape_layer(block, self._shape(index), sites, known, self._device)
        self._findings[index] = self._renamed(findings, index)
        left = self._after.layer(index)
        for name, tensor in _tensors(reduced, self._paths(index)).items():
            owner, _, leaf = name.rpartition(".")
            setattr(left.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in stored_buffers(reduced.module):
            left.get_buffer(name).data = buffer.data
        return left

    def _paths(self, index: int) -> list[str]:
        return [item.path for item in self._after.projections(index)]

    def _planned(self, index: int) -> list[Finding]:
        """Return what a layer loses as far as shapes alone tell it."""
        if self._shape(index) is None:
            return []
        number = self.block(index)
        layer = Layer(number, self._before.layer(number), self._before.heads.kv_heads)
        sites, _ = _known(self._before, layer, None)
        return self._renamed(planned_shape(layer, self._shape(index), sites)[1], index)

    def _shape(self, index: int) -> LayerShape | None:
        block, width, groups = self.block(index), self._kept.ffn_width, self._kept.kv_groups
        has_heads = bool(groups) and block in self._before.decoder.attention_layers
        if width is None and not has_heads:
            return None
        return LayerShape(block, ffn_width=width, kv_groups=groups[index] if has_heads else None)

    def _renamed(self, findings: list[Finding], index: int) -> list[Finding]:
        """Return findings of a block under the number that it has now."""
        old, new = f"layers.{self.block(index)}.", f"layers.{index}."
        return [replace(finding, target=new + finding.target.removeprefix(old)) for finding in findings]

    def _gone_blocks(self) -> list[Finding]:
        return [
            Finding(
                f"pruned.block_{layer.index}",
                Outcome.APPLIED,
                bytes_before=4 * sum(item.numel() for item in layer.module.parameters()),
                details={"pass": "prune-blocks"},
            )
            for layer in self._before.layers()
            if layer.index not in self._kept.blocks
        ]


def _known(
    description: ModelDescription, layer: Layer, statistics: DenseStatistics | None
) -> tuple[list[SitePlan], Mapping[str, Curvature]]:
    """Return a dense layer's matrices as sites, and what is known about them."""
    sites = plain_sites(layer, description.projections(layer.index))
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
    source: Source,
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
    blocks = kept_blocks(source.description, options.blocks, influence)
    groups: tuple[tuple[int, ...], ...] = ()
    if (wanted := options.kv_heads_keep) is not None:
        groups = tuple(
            _kept_groups(source.description, layer, statistics, wanted)
            for layer in source.layers()
            if layer.index in blocks
        )
    return Pruning(blocks, kept_width(source, options.ffn_keep), groups)


def kept_blocks(description: ModelDescription, dropped: int, influence: Sequence[float]) -> tuple[int, ...]:
    """Return the blocks that stay when those of the least influence go; one with attention always stays."""
    last = max(description.decoder.attention_layers, key=lambda block: (influence[block], block))
    others = sorted(set(range(description.layer_count)) - {last}, key=lambda block: influence[block])
    return tuple(sorted((*others[dropped:], last)))


def _kept_groups(
    description: ModelDescription, layer: Layer, statistics: DenseStatistics | None, wanted: int
) -> tuple[int, ...]:
    """Return the key/value heads of a block that stay; a block without attention is as if it kept the first ones."""
    wanted = min(wanted, layer.kv_groups)
    if layer.index not in description.decoder.attention_layers:
        return tuple(range(wanted))
    return tuple(largest(group_scores(layer, *_known(description, layer, statistics)), wanted).tolist())


def check_blocks(count: int, options: PruneOptions) -> None:
    """Refuse to drop every block.

    Raises:
        InputError: If none would be left.
    """
    if options.blocks >= count:
        raise InputError(
            f"{options.blocks} of {count} blocks", where="prune.blocks", fix=f"drop at most {count - 1}"
        )


def kept_width(source: Source, share: float) -> int | None:
    """Return the neurons of every MLP that stay at a share, None for all of them.

    Raises:
        InputError: If the share leaves nothing.
    """
    if share == 1:
        return None
    present = source.description.decoder.intermediate_size
    width = int(share * present) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    if width == 0:
        raise InputError(
            f"{share:g} of {present} neurons is less than {WIDTH_MULTIPLE}",
            where="prune.ffn_keep",
            fix="give a larger share",
        )
    return width
