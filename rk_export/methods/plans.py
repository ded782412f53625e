"""Plans of the methods that decide matrix by matrix before a plan is made: selected bases, sparse parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from rk_export.calibration.dense_statistics import Place
from rk_export.errors import InputError
from rk_export.methods.cap.pools import Prices
from rk_export.model.sites import plain_sites
from rk_export.options.compress import Budget, CompressOptions
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.weights.sparse import ENTRY_BYTES, VALUE_BYTES
from rk_export.plan import Plan, SitePlan
from rk_export.planning.candidates import Form
from rk_export.planning.currencies import table_count
from rk_export.planning.fixed_parts import fixed_parts, in_words
from rk_export.planning.stored_bytes import FLOAT_BYTES, matrix_bytes
from rk_export.report.humanize import size
from rk_export.source.protocol import Source

# Nodes of model.onnx that add a sparse matrix to a factor pair: 3.5 kB a matrix, and a little in reserve.
SUM_GRAPH_BYTES = 4_500


def basis_plan(source: Source, options: CompressOptions, ranks: Mapping[Place, int]) -> Plan:
    """Return the plan that stores every matrix at the rank that basis selection left it (2405.15877).

    The factorization that follows is the paper's second singular value decomposition; nothing is lost by it.

    Args:
        source: The tuned model.
        options: What was asked for.
        ranks: Of every matrix; 0 where the factor pair would be no smaller than the matrix.
    """

    def decided(site: SitePlan) -> SitePlan:
        rank = ranks.get((site.layer, site.paths[0]), 0)
        if not rank:
            return replace(
                site, quant=options.quant, reason="the selected bases are no smaller than the dense matrix"
            )
        form: Form = "identity" if options.form == "identity" else "joint"
        return replace(site, form=form, rank=rank, quant=options.quant)

    return _plan(source, options, decided)


def sparse_plan(source: Source, options: CompressOptions, parts: Mapping[Place, Parts]) -> Plan:
    """Return the plan that stores every matrix as the parts that were chosen for it (2505.03801)."""

    def decided(site: SitePlan) -> SitePlan:
        own = parts[site.layer, site.paths[0]]
        chosen = replace(site, form="sparse", rank=own.rank, entries=own.entries)
        if own.rank or options.quant is None:
            return replace(chosen, quant=options.quant)
        return replace(chosen, reason="no direction was chosen: entries are not quantized further")

    return _plan(source, options, decided)


def _plan(source: Source, options: CompressOptions, decided: Callable[[SitePlan], SitePlan]) -> Plan:
    sites = tuple(
        decided(site)
        for layer in source.description.layers()
        for site in plain_sites(layer, source.description.projections(layer.index))
    )
    named = replace(options, groups=())
    return Plan(source.config.model_type, source.structure(), named, sites)


def check_parts(plan: Plan, parts: Mapping[Place, Parts]) -> None:
    """Refuse a plan that asks for other parts than were chosen: which directions and entries is not in a plan.

    Raises:
        InputError: Names the site.
    """
    for site in plan.sites:
        if site.form != "sparse":
            continue
        own = parts.get((site.layer, site.paths[0]))
        if own is None or (own.rank, own.entries) != (site.rank, site.entries):
            found = "none" if own is None else f"rank {own.rank} and {own.entries} entries"
            raise InputError(
                f"the plan has rank {site.rank} and {site.entries} sparse entries, the search chose {found}",
                where=site.site,
                fix="change the budget instead, or make the plan anew with `rk-export plan --method cap`",
            )


def stored_prices(options: CompressOptions) -> Prices:
    """Return the bytes that parts take in the exported files: of a factor's number, an entry, and a full column's.

    The place of a full column is left out: 4 bytes, to two for each of its rows.
    """
    sample = 256  # numbers that fill whole blocks of every size
    number = matrix_bytes(1, sample, options.quant, FLOAT_BYTES[options.float_dtype]) / sample
    return Prices(number, ENTRY_BYTES, VALUE_BYTES)


def sparse_budget(source: Source, options: CompressOptions) -> Budget:
    """Return what low rank and sparse parts may cost together: a size without all that is stored beside them.

    Raises:
        InputError: If nothing is left for them.
    """
    budget = options.budget
    if budget is None:
        raise ValueError("the options have no budget")
    if budget.kind != "size":
        return budget
    config = source.config
    float_bytes = FLOAT_BYTES[options.float_dtype]
    table = matrix_bytes(config.vocab_size, config.hidden_size, options.embedding_quant, float_bytes)
    matrices = len(source.description.matrices)
    parts = fixed_parts(source.description, options)
    fixed, tables = sum(part.bytes for part in parts), table_count(source) * table
    rest = fixed + tables + matrices * SUM_GRAPH_BYTES
    if rest >= budget.value:
        raise InputError(
            f"{size(rest)} are taken by what low rank and sparse parts do not replace: embedding {size(tables)}, "
            f"nodes of sparse products {size(matrices * SUM_GRAPH_BYTES)}, {in_words(parts)}",
            where="--size",
            fix="give a larger budget, or fewer --embedding-bits",
        )
    return replace(budget, value=budget.value - rest)
