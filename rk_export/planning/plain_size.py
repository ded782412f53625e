"""What plain INT4 makes of a model: its bytes, which the default spends better, and when it is all that there is.

Plain INT4 stores every matrix alike: linear layers in 4 bits, blocks of 32, tables of vocabulary size in 8 bits. The
table of an encoder is no output projection and takes 4 bits too.
"""

from __future__ import annotations

from rk_export.options.recipe import Recipe
from rk_export.planning.budget_units import PLAIN_LAYERS, plain_table
from rk_export.planning.fixed_parts import fixed_bytes
from rk_export.planning.stored_bytes import FLOAT_BYTES, matrix_bytes
from rk_export.source.protocol import Source


def plain_int4_bytes(source: Source, recipe: Recipe) -> int:
    """Return the bytes of the files that plain INT4 takes, counted as a budget of size counts them.

    Shapes alone make it. The graph's nodes are an upper estimate, as in every planned size, so the real files are a
    little smaller.

    Args:
        source: The dense model.
        recipe: With the float type and the context; its formats and its budget are not looked at.
    """
    float_bytes = FLOAT_BYTES[recipe.target.float_dtype]
    total = fixed_bytes(source.description, recipe)
    total += sum(
        matrix_bytes(*matrix.shape, PLAIN_LAYERS, float_bytes) for matrix in source.description.matrices
    )
    table = matrix_bytes(*source.description.table_shape, plain_table(source), float_bytes)
    total += source.description.table_count * table
    return round(total)


def why_plain(source: Source, recipe: Recipe) -> str:
    """Return why a model gets plain INT4 where the default would spend its bytes by predicted loss, or nothing.

    Args:
        source: The dense model.
        recipe: With the calibration.
    """
    if not recipe.calibration.uses_text:
        return (
            f"calibration.text {recipe.calibration.metric} gathers no statistics that formats could be chosen by: "
            "every matrix takes INT4 in blocks of 32"
        )
    return ""
