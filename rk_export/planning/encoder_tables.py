"""The format of an encoder's token table where a recipe speaks of the output projection too.

Recipes give the token embedding more bits than the layers because it is the output projection of most decoders, whose
errors count in every logit. An encoder only looks rows up.
"""

from __future__ import annotations

from dataclasses import replace

from rk_export.options.quantize import TABLES, Quantize, names_of_table
from rk_export.options.recipe import Recipe

FEWEST_BITS = 4  # of a row that is looked up
NOTICE = (
    "the token table takes INT{bits}, as the layers do: the recipe gives more bits to a table that is an output "
    "projection, and an encoder has none; name embed_tokens alone to choose"
)


def with_encoder_table(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Return a recipe for an encoder, and a notice where its token table takes fewer bits than the recipe says.

    Args:
        recipe: With a step that names the embedding together with the output projection, or leaves its format open
            without a budget; any other recipe stays as it is.
    """
    embedding, head = TABLES
    step, layers = recipe.quantize_step_of(names_of_table(embedding)), recipe.quant
    if step is None or layers is None or layers.activations == 8:
        return recipe, ()
    is_open = step.bits == "auto" and recipe.budget is None
    bits, asked = max(FEWEST_BITS, layers.bits), step.spec(table=True).bits
    if not (is_open or (step.bits != "auto" and head in step.targets)) or bits >= asked:
        return recipe, ()
    own = Quantize(targets=(embedding,), bits=bits, block=step.block, symmetric=False)
    last = max(index for index, each in enumerate(recipe.steps) if isinstance(each, Quantize))
    steps = (*recipe.steps[: last + 1], own, *recipe.steps[last + 1 :])
    return replace(recipe, steps=steps), (NOTICE.format(bits=bits),)
