"""Structured pruning at work: what stays is chosen, and the source is read without the rest."""

from __future__ import annotations

from rk_export.calibration.model_statistics import model_statistics
from rk_export.calibration.redundancy import block_influence
from rk_export.errors import InputError
from rk_export.methods.base import Method, Work
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.prune.pruned import Pruned, check_blocks, chosen_pruning, kept_blocks, kept_width
from rk_export.model.pruned_description import check_decoder, pruned_description
from rk_export.options.recipe import Recipe
from rk_export.plan import Pruning
from rk_export.source.protocol import Source
from rk_export.source.transformed import Transformed


class Prune(Method[PruneOptions]):
    """Leaves out whole blocks, FFN neurons and key/value heads."""

    def check(self, source: Source, recipe: Recipe) -> None:
        """Refuse what the family cannot lose."""
        check_decoder(source.description)
        check_blocks(source.layer_count, self.options)
        if self.options.blocks and not recipe.calibration.uses_text:
            raise InputError(
                f"blocks are judged on text, which the metric {recipe.calibration.metric} does not read",
                where="prune.blocks",
                fix="set calibration.text to self or to a file",
            )
        first = [-float(block) for block in range(source.layer_count)]
        kept = kept_blocks(source.description, self.options.blocks, first)
        groups: tuple[tuple[int, ...], ...] = ()
        if self.options.kv_heads_keep is not None:
            groups = (tuple(range(self.options.kv_heads_keep)),) * len(kept)
        pruned_description(
            source.description, Pruning(kept, kept_width(source, self.options.ffn_keep), groups)
        )

    def transform(self, work: Work) -> Transformed:
        """Return what is left; a plan says what stays, else calibration text decides, or the weights without it."""
        source, pruning = work.source, work.pruning
        statistics, influence = None, [0.0] * source.layer_count
        if work.tokens is not None:
            statistics = model_statistics(source, work.tokens, work.recipe, work.device)
            if pruning is None and self.options.blocks:
                influence = block_influence(source, work.tokens, work.device)
        pruning = pruning or chosen_pruning(source, self.options, influence, statistics)
        return source.then(Pruned(source.description, pruning, statistics, work.device))


METHOD = Prune
