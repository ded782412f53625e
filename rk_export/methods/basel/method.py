"""Basis selection (2405.15877) at work: the model is tuned for a task, and every matrix keeps the rank it ends with."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rk_export.calibration.target_text import target_tokens
from rk_export.methods.base import Decision, Method, Work, matrices
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.basel.selection import Selection, check_selection, select_basis
from rk_export.model.context import own_context
from rk_export.options.recipe import Recipe
from rk_export.plan import SitePlan
from rk_export.planning.candidates import Form
from rk_export.source.protocol import Source
from rk_export.source.replaced import Replaced
from rk_export.source.transformed import Transformed

# Tokens that a sequence of a target task has.
TASK_LENGTH = 256


class BasisSelection(Method[BaselOptions]):
    """Trains the directions of every matrix on a task's text and drops those that it needs least."""

    sets_target = True  # what the model was tuned to do is to be recovered too

    def __init__(self, options: BaselOptions) -> None:
        super().__init__(options)
        self._selection: Selection | None = None

    def check(self, source: Source, recipe: Recipe) -> None:
        """Refuse encoders, experts, a rank rule that cannot be met, and texts that cannot be used."""
        check_selection(source, self.options.rule, self.options)
        task_tokens(source, self.options)

    def transform(self, work: Work) -> Transformed:
        """Return the model with the trained values."""
        tokens = task_tokens(work.source, self.options)
        self._selection = select_basis(
            work.source, tokens, self.options.rule, self.options, device=work.device, state=work.state
        )
        self.findings = (self._selection.finding,)
        return work.source.then(Replaced(self._selection.tensors))

    def decide(self, work: Work) -> Decision:
        """Store every matrix at the rank that was left; the second singular value decomposition loses nothing."""
        if self._selection is None:
            raise RuntimeError("`transform` comes first")
        ranks = self._selection.ranks
        form: Form = "identity" if self.options.form == "identity" else "joint"

        def decided(site: SitePlan) -> SitePlan:
            site = replace(site, quant=work.recipe.format_of(site.members[0], site.paths[0], site.layer))
            if rank := ranks.get(site.matrices[0], 0):
                return replace(site, form=form, rank=rank)
            return replace(site, reason="the selected bases are no smaller than the dense matrix")

        return Decision(tuple(decided(site) for site in matrices(work.source)))


def task_tokens(source: Source, options: BaselOptions) -> Tensor:
    """Return the text of a target task, int64 (sequences, length), at most what the training reads.

    Raises:
        InputError: If the file is empty, no UTF-8 text or too short for one sequence.
    """
    length = min(TASK_LENGTH, own_context(source.config))
    wanted = (options.steps + options.tune) * options.batch_tokens
    rows = int(source.config.vocab_size)
    return target_tokens(options.target.place(), source.folder, length, -(-wanted // length), rows=rows)


METHOD = BasisSelection
