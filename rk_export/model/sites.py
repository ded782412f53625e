"""The layers of a model and their matrices as sites: what plans are made of."""

from __future__ import annotations

from rk_export.errors import InputError
from rk_export.model.architecture import Projection
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import GROUPS
from rk_export.options.recipe import Recipe
from rk_export.passes.base import Layer
from rk_export.plan import SitePlan

# Hidden sizes below this count as small models, whose ranks are rounded in finer steps.
SMALL_HIDDEN_SIZE = 2048


def plain_sites(layer: Layer, projections: tuple[Projection, ...]) -> list[SitePlan]:
    """Return every matrix of a layer as a dense site of its own, in floats."""
    return dense_sites(layer, projections, Recipe())


def dense_sites(
    layer: Layer, projections: tuple[Projection, ...], recipe: Recipe, groups: tuple[str, ...] | None = None
) -> list[SitePlan]:
    """Return the sites of one layer, all dense: the groups asked for first, then every other matrix.

    Args:
        layer: Gives the index.
        projections: The layer's matrices.
        recipe: Their formats and corrections.
        groups: What is joined; None takes the groups of the recipe.

    Raises:
        InputError: Matrices that are joined have different formats.
    """
    paths: dict[str, str] = {item.role: item.path for item in projections if item.role != "expert"}
    left = dict(paths)
    members: dict[str, dict[str, str]] = {}
    for group in (recipe.groups or ()) if groups is None else groups:
        if all(role in paths for role in GROUPS[group]):
            members[group] = {role: left.pop(role) for role in GROUPS[group]}
    members |= {role: {role: path} for role, path in left.items()}
    sites = [
        _dense_site(layer.index, name, tuple(roles), tuple(roles.values()), recipe)
        for name, roles in members.items()
    ]
    if experts := tuple(item.path for item in projections if item.role == "expert"):
        sites.append(_dense_site(layer.index, "experts", ("expert",) * len(experts), experts, recipe))
    return sites


def _dense_site(
    layer: int, name: str, members: tuple[str, ...], paths: tuple[str, ...], recipe: Recipe
) -> SitePlan:
    formats = [recipe.format_of(role, path, layer) for role, path in zip(members, paths, strict=True)]
    if any(spec != formats[0] for spec in formats):
        raise InputError(
            f"{' and '.join(dict.fromkeys(members))} share a site, and need one format",
            where=f"quantize: layers.{layer}.{name}",
            fix="name all of them in the targets, or do not factorize them together",
        )
    weight_only = formats[0] is not None and formats[0].activations != 8
    correction = recipe.correction if weight_only else 0
    return SitePlan(
        f"layers.{layer}.{name}", layer, members, paths, "dense", 0, formats[0], correction=correction
    )


def default_multiple(columns: int, rows: int, quant: QuantSpec | None) -> int:
    """Return the step that ranks are rounded to.

    Quantized, the up-projection's columns are whole blocks, and CUDA's INT4 kernel needs output sizes in
    multiples of 64; small matrices keep a finer grain.
    """
    small = min(columns, rows) < SMALL_HIDDEN_SIZE
    if quant is None:
        return 8 if small else 64
    return max(32 if small else 64, quant.block_size) if min(columns, rows) > 2 * quant.block_size else 8
