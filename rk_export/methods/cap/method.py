"""Global rank and sparsity optimization (2505.03801) at work."""

from __future__ import annotations

from rk_export.methods.base import Decision, Method, Work
from rk_export.methods.cap.choose import cap_parts
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.sparse_sites import (
    amount_of,
    check_source,
    sparse_budget,
    sparse_decision,
    stored_prices,
)
from rk_export.options.recipe import Recipe
from rk_export.source.protocol import Source


class RankAndSparsity(Method[CapOptions]):
    """Splits matrices into low rank and sparse parts, and spends one budget on the parts of all of them."""

    def check(self, source: Source, recipe: Recipe) -> None:
        """Refuse encoders, experts, and budgets that keep nothing or everything."""
        check_source(source, self.options.name)
        amount_of(source, sparse_budget(source, recipe), stored_prices(recipe))

    def decide(self, work: Work) -> Decision:
        """Choose rank and entries of every matrix."""
        options = work.recipe
        parts = cap_parts(
            work.source,
            sparse_budget(work.source, options),
            self.options,
            tokens=work.tokens,
            statistics=work.statistics,
            device=work.device,
            prices=stored_prices(options),
        )
        return sparse_decision(work.source, options, parts)


METHOD = RankAndSparsity
