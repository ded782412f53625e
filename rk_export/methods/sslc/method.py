"""Sparse and low rank together (SSLC, 2510.26446) at work."""

from __future__ import annotations

from rk_export.methods.base import Decision, Method, Work
from rk_export.methods.sparse_sites import (
    amount_of,
    check_source,
    sparse_budget,
    sparse_decision,
    stored_prices,
)
from rk_export.methods.sslc.choose import sslc_parts
from rk_export.methods.sslc.options import SslcOptions
from rk_export.options.recipe import Recipe
from rk_export.source.protocol import Source


class SparseAndLowRank(Method[SslcOptions]):
    """Spends one budget over what every matrix may become, and fits the entries and directions that it buys."""

    def check(self, source: Source, recipe: Recipe) -> None:
        """Refuse encoders, experts, and budgets that keep nothing or everything."""
        check_source(source, self.options.name)
        amount_of(source, sparse_budget(source, recipe), stored_prices(recipe))

    def decide(self, work: Work) -> Decision:
        """Choose rank and entries of every matrix, and their values."""
        if work.statistics is None:
            raise ValueError("sslc needs the statistics of the dense model")
        options = work.recipe
        parts = sslc_parts(
            work.source,
            sparse_budget(work.source, options),
            self.options,
            statistics=work.statistics,
            device=work.device,
            prices=stored_prices(options),
        )
        return sparse_decision(work.source, options, parts)


METHOD = SparseAndLowRank
