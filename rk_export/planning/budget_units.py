"""What a budget is counted in (parameters, bytes, milliseconds of this machine), and what it chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.ranks import GROUPS, Budget
from rk_export.options.recipe import Recipe
from rk_export.plan import SitePlan
from rk_export.planning.candidates import Cost, Form, SearchSpace
from rk_export.planning.cost_table import CostTable
from rk_export.planning.fixed_parts import FixedPart, fixed_bytes, fixed_parts
from rk_export.planning.stored_bytes import FLOAT_BYTES, Format, Shape, matrix_bytes
from rk_export.report.humanize import size
from rk_export.source.protocol import Source

# Blocks of 16 are left out: on CPU a 4-bit product then takes 1.8 times as long for one token, a 2-bit one, for which
# there is no kernel, 70 times. Zero points take no time. docs/results/formats.md has the measurements.
WEIGHT_FORMATS: tuple[Format, ...] = (
    QuantSpec(2, 64, symmetric=False),
    QuantSpec(2, 32, symmetric=False),
    QuantSpec(4, 128, symmetric=False),
    QuantSpec(4, 64, symmetric=False),
    QuantSpec(4, 32),
    QuantSpec(4, 32, symmetric=False),
    QuantSpec(8, 128),
    QuantSpec(8, 64),
    QuantSpec(8, 32),
    None,
)
PAIR_FORMATS: tuple[Format, ...] = (QuantSpec(4, 32, symmetric=False), QuantSpec(8, 128), None)
TABLE_FORMATS: tuple[Format, ...] = (
    QuantSpec(4, 64, symmetric=False),
    QuantSpec(4, 32, symmetric=False),
    QuantSpec(8, 128),
    QuantSpec(8, 64),
    QuantSpec(8, 32),
    None,
)
# Plain INT4. Where a budget of bytes leaves every matrix the format of its layers, factor pairs are not looked for:
# SmolLM2's predicted loss would be 5 percent lower at 80 MB and 1 percent at 90 MB, but a pair is two products where
# one would do.
PLAIN_LAYERS, PLAIN_TABLES = QuantSpec(4, 32), QuantSpec(8, 32)
PLAIN_LOOKUP = QuantSpec(4, 32, symmetric=False)
# The time of a product hardly depends on the block: one weight-only format for each number of bits.
TIMED_FORMATS: tuple[Format, ...] = (QuantSpec(4, 32, symmetric=False), QuantSpec(8, 32), W8A8, None)


@dataclass(frozen=True)
class BudgetUnit:
    """What a budget is counted in, and the search space that goes with it.

    Args:
        budget: What was asked for.
        name: parameters, bytes or ms.
        space: What a site may become, and what that costs.
        tables: Formats of the embedding that share the budget; empty where it is no part of it.
        packs: Sites that the graph can compute in one product take one format.
        fixed: What the model costs beside the sites and the embedding.
        parts: What `fixed` consists of, in a budget of bytes.
    """

    budget: Budget
    name: str
    space: SearchSpace
    tables: tuple[Format, ...] = ()
    packs: bool = False
    fixed: float = 0.0
    parts: tuple[FixedPart, ...] = ()

    def amount(self, sites: Sequence[SitePlan], shapes: Sequence[Sequence[Shape]]) -> float:
        """Return what may be spent on the sites, and on the embedding if it is part of the budget.

        Args:
            sites: All sites, dense.
            shapes: (out, in) of each site's members.
        """
        value, kind = self.budget.amount, self.budget.kind
        if kind == "size":
            return value - self.fixed
        if kind == "speed_up":
            floats = sum(self.space.cost(rows, columns, None) for site in shapes for rows, columns in site)
            return (self.fixed + floats) / value - self.fixed
        parameters = [sum(rows * columns for rows, columns in site) for site in shapes]
        if kind == "mean_bits":
            return value / 8 * sum(parameters)
        return sum(
            count * (value if site.members in self.space.factorized else 1)
            for site, count in zip(sites, parameters, strict=True)
        )


def in_words(cost: float, unit: str) -> str:
    """Return a cost with its unit."""
    if unit == "bytes":
        return size(round(cost))
    return f"{cost:.3g} {unit}" if unit == "ms" else f"{cost:,.0f} {unit}"


def budget_unit(source: Source, recipe: Recipe, rank_step: int, costs: CostTable | None = None) -> BudgetUnit:
    """Return the unit of a budget.

    Args:
        source: The dense model.
        recipe: With a budget.
        rank_step: Ranks are multiples of it.
        costs: Measured times; needed for a speed-up.

    Raises:
        ValueError: If the options have no budget, or a speed-up comes without measured times.
    """
    budget = recipe.budget
    if budget is None:
        raise ValueError("the recipe has no budget")
    groups = frozenset(GROUPS[group] for group in recipe.groups or ())
    kv_groups = source.description.heads.kv_heads
    float_bytes = FLOAT_BYTES[recipe.target.float_dtype]

    forms: tuple[Form, ...] = ("joint", "identity")
    if recipe.factorize.form is not None:
        forms = ("identity",) if recipe.factorize.form == "identity" else ("joint",)

    def space(formats: tuple[Format, ...], pairs: tuple[Format, ...], cost: Cost) -> SearchSpace:
        return SearchSpace(
            formats,
            pairs,
            forms,
            rank_step,
            recipe.quantizer == "gptq",
            kv_groups,
            cost,
            groups,
            _is_open(recipe),
        )

    if budget.kind == "keep":
        return BudgetUnit(budget, "parameters", space((), (), lambda rows, columns, _: rows * columns))
    if budget.kind == "speed_up":
        if costs is None:
            raise ValueError("a speed-up needs measured times")
        timed = TIMED_FORMATS if recipe.target.ep == "cpu" else tuple(f for f in TIMED_FORMATS if f != W8A8)
        return BudgetUnit(budget, "ms", space(timed, timed, costs.milliseconds), fixed=costs.rest)
    in_bytes = space(
        weight_formats(recipe),
        PAIR_FORMATS,
        lambda rows, columns, spec: matrix_bytes(rows, columns, spec, float_bytes),
    )
    if budget.kind == "mean_bits":
        return BudgetUnit(budget, "bytes", in_bytes, packs=True)
    parts = fixed_parts(source.description, recipe)
    fixed = sum(part.bytes for part in parts)
    tables = TABLE_FORMATS if recipe.table_is_open else (recipe.table_quant,)
    return BudgetUnit(budget, "bytes", in_bytes, tables, packs=True, fixed=fixed, parts=parts)


def _is_open(recipe: Recipe) -> Callable[[SitePlan], bool]:
    """Return what says whether a budget chooses the format of a site; parameters have no format."""
    counts_bits = recipe.budget is not None and recipe.budget.kind != "keep"

    def is_open(site: SitePlan) -> bool:
        places = zip(site.members, site.paths, strict=True)
        return counts_bits and all(recipe.is_open(role, path, site.layer) for role, path in places)

    return is_open


def timed_formats(source: Source, recipe: Recipe) -> tuple[Format, ...]:
    """Return the formats whose products have to be timed for a speed-up: those on offer, and those that are fixed."""
    fixed = {
        recipe.format_of(matrix.role, matrix.id.path, matrix.id.layer)
        for matrix in source.description.matrices
    }
    return (*TIMED_FORMATS, *(spec for spec in fixed if spec not in TIMED_FORMATS))


def weight_formats(recipe: Recipe) -> tuple[Format, ...]:
    """Return the formats of a dense matrix that a graph for the recipe's provider may hold.

    ONNX Runtime before 1.31 has no 2-bit products on CUDA.
    """
    return tuple(f for f in WEIGHT_FORMATS if f is None or f.bits > 2 or recipe.target.ep == "cpu")


def is_comfortable(source: Source, recipe: Recipe) -> bool:
    """Whether a budget of bytes may choose every format, and leaves every matrix and the embedding plain INT4's format.

    Shapes alone tell it.
    """
    budget, float_bytes = recipe.budget, FLOAT_BYTES[recipe.target.float_dtype]
    if budget is None or budget.kind not in ("size", "mean_bits"):
        return False
    matrices = source.description.matrices
    if not all(recipe.is_open(one.role, one.id.path, one.id.layer) for one in matrices):
        return False
    shapes = [matrix.shape for matrix in matrices]
    needed = sum(matrix_bytes(*shape, PLAIN_LAYERS, float_bytes) for shape in shapes)
    if budget.kind == "mean_bits":
        return budget.amount / 8 * sum(rows * columns for rows, columns in shapes) >= needed
    spec = PLAIN_LAYERS if recipe.table_is_open else recipe.table_quant
    table = matrix_bytes(*source.description.table_shape, spec, float_bytes)
    needed += source.description.table_count * table
    return budget.amount - fixed_bytes(source.description, recipe) >= needed


def plain_table(source: Source) -> QuantSpec:
    """Return the format of the token table in plain INT4; that of an encoder is no output projection."""
    return PLAIN_LOOKUP if source.architecture.is_encoder else PLAIN_TABLES
