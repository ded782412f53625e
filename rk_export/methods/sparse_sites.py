"""Low rank plus sparse matrices, whichever method chose their parts: prices, budget, sites."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.methods.base import Decision, matrices
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.weights.sparse import ENTRY_BYTES, VALUE_BYTES
from rk_export.plan import Plan, SitePlan
from rk_export.planning.fixed_parts import fixed_parts, in_words
from rk_export.planning.stored_bytes import FLOAT_BYTES, matrix_bytes
from rk_export.report.humanize import size
from rk_export.scratch import laid_down
from rk_export.source.protocol import Source

logger = logging.getLogger(__name__)

# Nodes of model.onnx that add a sparse matrix to a factor pair: 3.5 kB a matrix, and a little in reserve.
SUM_GRAPH_BYTES = 4_500


@dataclass(frozen=True)
class Prices:
    """What candidates cost.

    Args:
        number: One number of a factor; a direction of an (out, in) matrix has out + in of them.
        entry: One sparse entry.
        column: One number of a column of entries that is stored dense, place and all; a full matrix of entries
            costs this.
    """

    number: float
    entry: float
    column: float

    def total(self, shape: tuple[int, int], rank: int, entries: int) -> float:
        """Return what a factor pair of an (out, in) matrix and entries beside it cost together."""
        full = self.column * shape[0] * shape[1]
        return self.number * rank * sum(shape) + min(self.entry * entries, full)


PARAMETERS = Prices(1, 1, 1)
# Factors in float32. Entries in half precision, their places as one-byte gaps to the entry before.
BYTES = Prices(4, 3, 2)


def sparse_decision(source: Source, recipe: Recipe, parts: Mapping[MatrixId, Parts]) -> Decision:
    """Return the decision that stores every matrix as the parts that were chosen for it."""

    def decided(site: SitePlan) -> SitePlan:
        own = parts[site.matrices[0]]
        chosen = replace(site, form="sparse", rank=own.rank, entries=own.entries)
        quant = recipe.format_of(site.members[0], site.paths[0], site.layer)
        if own.rank or quant is None:
            return replace(chosen, quant=quant)
        return replace(chosen, reason="no direction was chosen: entries are not quantized further")

    return Decision(tuple(decided(site) for site in matrices(source)), parts)


def on_disk(parts: Parts) -> Parts:
    """Return the parts of a matrix with large tensors mapped."""
    return Parts(*(laid_down(item) for item in (parts.up, parts.down, parts.indices, parts.values)))


def check_parts(plan: Plan, parts: Mapping[MatrixId, Parts]) -> None:
    """Refuse a plan that asks for other parts than were chosen: which directions and entries is not in a plan.

    Raises:
        InputError: Names the site.
    """
    for site in plan.sites:
        if site.form != "sparse":
            continue
        own = parts.get(site.matrices[0])
        if own is None or (own.rank, own.entries) != (site.rank, site.entries):
            found = "none" if own is None else f"rank {own.rank} and {own.entries} entries"
            raise InputError(
                f"the plan has rank {site.rank} and {site.entries} sparse entries, the search chose {found}",
                where=site.site,
                fix="change the budget instead, or make the plan anew with `rk-export plan`",
            )


def stored_prices(recipe: Recipe) -> Prices:
    """Return the bytes that parts take in the exported files: of a factor's number, an entry, and a full column's.

    The place of a full column is left out: 4 bytes, to two for each of its rows.
    """
    sample = 256  # numbers that fill whole blocks of every size
    number = matrix_bytes(1, sample, recipe.quant, FLOAT_BYTES[recipe.target.float_dtype]) / sample
    return Prices(number, ENTRY_BYTES, VALUE_BYTES)


def sparse_budget(source: Source, recipe: Recipe) -> Budget:
    """Return what low rank and sparse parts may cost together: a size without all that is stored beside them.

    Raises:
        InputError: If nothing is left for them.
    """
    budget = recipe.limit
    if budget is None:
        raise ValueError("the recipe has no budget")
    if budget.kind != "size":
        return budget
    float_bytes = FLOAT_BYTES[recipe.target.float_dtype]
    table = matrix_bytes(*source.description.table_shape, recipe.table_quant, float_bytes)
    matrices = len(source.description.matrices)
    parts = fixed_parts(source.description, recipe)
    fixed, tables = sum(part.bytes for part in parts), source.description.table_count * table
    rest = fixed + tables + matrices * SUM_GRAPH_BYTES
    if rest >= budget.amount:
        raise InputError(
            f"{size(rest)} are taken by what low rank and sparse parts do not replace: embedding {size(tables)}, "
            f"nodes of sparse products {size(matrices * SUM_GRAPH_BYTES)}, {in_words(parts)}",
            where=budget.flag,
            fix="give a larger budget, or quantize embed_tokens and lm_head",
        )
    return replace(budget, value=budget.amount - rest)


def check_source(source: Source, method: str) -> None:
    """Refuse, before any work, models that low rank plus sparse does not cover.

    Args:
        source: The dense model.
        method: Who asks, for the message.

    Raises:
        InputError: If the model is an encoder or has experts.
    """
    if source.architecture.is_encoder:
        raise InputError(
            f"{source.config.model_type} is an encoder: it has no next-token loss to choose by",
            where=method,
            fix="take a recipe with a rank rule: --recipe joint-rank",
        )
    for layer in range(source.layer_count):
        for item in source.description.projections(layer):
            if item.role == "expert":
                raise InputError(
                    f"layer {layer} of {source.config.model_type} has experts, of which a token reads a few: one loss "
                    "for all matrices says little about each",
                    where=method,
                    fix=f"give a budget without {method}",
                )


def linear_shapes(source: Source) -> dict[MatrixId, tuple[int, int]]:
    """Return (out, in) of every matrix of the decoder layers."""
    return {matrix.id: matrix.shape for matrix in source.description.matrices}


def amount_of(source: Source, budget: Budget, stored: Prices | None = None) -> tuple[float, Prices]:
    """Return what a budget may spend on the matrices of the decoder layers, and the prices in its unit.

    Args:
        source: The dense model.
        budget: A share or a size.
        stored: Prices of a size; `BYTES` when None.

    Raises:
        InputError: If the budget is no share and no size, keeps nothing, or holds all entries of the matrices.
    """
    if budget.kind not in ("keep", "size"):
        raise InputError(
            f"rank and sparsity have no price in {budget.name}",
            where=budget.flag,
            fix="give --keep or --size",
        )
    numbers = sum(rows * columns for rows, columns in linear_shapes(source).values())
    prices = PARAMETERS if budget.kind == "keep" else stored or BYTES
    amount = budget.amount * numbers if budget.kind == "keep" else budget.amount
    if amount >= numbers * prices.column:
        raise InputError(
            f"all entries of the matrices take {size(numbers * prices.column)}, which the budget holds",
            where=budget.flag,
            fix="give less, or leave them dense",
        )
    if amount < prices.entry:
        raise keeps_nothing(budget)
    return amount, prices


def share_of_entries(source: Source, amount: float, prices: Prices) -> float:
    """Return the share of all entries that an amount buys."""
    numbers = sum(rows * columns for rows, columns in linear_shapes(source).values())
    return min(1.0, amount / (prices.entry * numbers))


def over_dense(parts: Mapping[MatrixId, Parts]) -> list[MatrixId]:
    """Return the matrices whose parts have more parameters than the dense matrix; a global choice may do that."""
    return [place for place, item in parts.items() if item.parameters > item.shape[0] * item.shape[1]]


def log_choice(parts: Mapping[MatrixId, Parts]) -> None:
    """Log rank, density and how many matrices have more parameters than dense ones."""
    numbers = sum(item.shape[0] * item.shape[1] for item in parts.values())
    entries = sum(item.entries for item in parts.values())
    factors = sum(item.parameters for item in parts.values()) - entries
    logger.info(
        "low rank plus sparse: factors %.1f %% and entries %.1f %% of the parameters; %d of %d matrices have more "
        "than dense, %d have rank 0, %d no entry",
        100 * factors / numbers,
        100 * entries / numbers,
        len(over_dense(parts)),
        len(parts),
        sum(item.rank == 0 for item in parts.values()),
        sum(item.entries == 0 for item in parts.values()),
    )


def keeps_nothing(budget: Budget) -> InputError:
    return InputError("the budget keeps nothing of any matrix", where=budget.flag, fix="give more")
