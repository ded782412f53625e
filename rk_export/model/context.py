"""How many positions a bundle takes: the model's own context, or what `target.context_length` asks for."""

from __future__ import annotations

import copy

from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.model.config_fields import number
from rk_export.model.description import ModelDescription
from rk_export.model.families.registry import FAMILIES, architecture_of
from rk_export.model.rotary import rotary_parameters

# Tokens of a prompt that parity is measured on.
PROMPT_LENGTH = 32
OPTION = "target.context_length"
# Positions become float32 in the rotary tables, which holds no larger whole number exactly.
MOST_POSITIONS = 2**24
# Of a model whose config states none, as that of BLOOM, which was trained on as many.
_UNSTATED = 2048
# Scalings that name the length that they were made for: factor times the original length.
_MADE_FOR_A_LENGTH = ("yarn", "longrope")
# Dynamic NTK: the frequencies of a text beyond max_position_embeddings depend on how long it is.
_CHANGES_BEYOND = "dynamic"


def own_context(config: PretrainedConfig) -> int:
    """Return the context that a model states, in tokens; rows of learned positions that no token takes left out.

    Raises:
        InputError: It is no number.
    """
    # The text of a model that reads images has a type of its own, which is no family's.
    family = FAMILIES.get(config.model_type)
    field = "max_position_embeddings" if family is None else family.architecture.context_field
    stated = number(config, field) if getattr(config, field, None) else _UNSTATED
    return int(stated) - _skipped(config)


def _skipped(config: PretrainedConfig) -> int:
    family = FAMILIES.get(config.model_type)
    return 0 if family is None or family.skipped_rows is None else family.skipped_rows(config)


def context_of(config: PretrainedConfig, wanted: int | None) -> int:
    """Return the context of a bundle, in tokens; ``wanted`` None takes the model's own."""
    return own_context(config) if wanted is None else wanted


def check_context(description: ModelDescription, wanted: int | None) -> None:
    """Refuse a context that the model cannot take, the one that it states included.

    Raises:
        InputError: Names the longest that it can, or the shortest that can be checked.
    """
    longest, reason = _longest(description)
    context = context_of(description.config, wanted)
    where = f"config.json: {description.architecture.context_field}" if wanted is None else OPTION
    if context < PROMPT_LENGTH:
        raise InputError(
            f"a context of {context} tokens is too short: parity is measured on prompts of {PROMPT_LENGTH}",
            where=where,
            fix=f"give {OPTION} {PROMPT_LENGTH} or more" if longest >= PROMPT_LENGTH else "use another model",
        )
    if wanted is None and context > MOST_POSITIONS:
        raise InputError(
            f"a context of {context} tokens is too long: float32 tells {MOST_POSITIONS} positions apart",
            where=where,
            fix=f"give {OPTION} TOKENS, the length that you need",
        )
    if wanted is not None and wanted > longest:
        raise InputError(
            f"a context of {wanted} tokens is too long: {reason}", where=OPTION, fix=f"give at most {longest}"
        )


def context_notices(description: ModelDescription, wanted: int | None) -> tuple[str, ...]:
    """Return what a user must know of a context that is not the model's own, or could be longer."""
    config = description.config
    own, (longest, reason) = own_context(config), _longest(description)
    if wanted is not None and wanted > own and _allowed_by_scaling(config) is None:
        return (
            f"the context of {wanted} tokens is longer than the {own} that the model was made for: the graph computes "
            "what PyTorch computes, but how good the text is there nobody trained; measure it",
        )
    if wanted is None and own < longest < MOST_POSITIONS:
        return (f"the bundle takes {own} tokens; {reason}: give {OPTION} {longest} for all of them",)
    return ()


def with_context(config: PretrainedConfig, wanted: int | None) -> PretrainedConfig:
    """Return a config that states a context; how its positions are rotated stays as it was."""
    if wanted is None:
        return config
    stated = copy.deepcopy(config)
    for parameters in rotary_parameters(stated).values():
        if parameters["rope_type"] in _MADE_FOR_A_LENGTH and parameters.get("factor") is None:
            # transformers derives it from the length that is about to change, and attention's scale from it.
            parameters["factor"] = own_context(config) / parameters["original_max_position_embeddings"]
    setattr(stated, architecture_of(config).context_field, wanted + _skipped(config))
    return stated


def _longest(description: ModelDescription) -> tuple[int, str]:
    """Return the longest context that a model can take, and why."""
    config = description.config
    own = own_context(config)
    if description.architecture.has_learned_positions:
        return own, f"the model has learned {own} positions"
    if any(parameters["rope_type"] == _CHANGES_BEYOND for parameters in rotary_parameters(config).values()):
        return own, "its rotary scaling rotates longer texts by angles that depend on their length"
    if (allowed := _allowed_by_scaling(config)) is not None:
        return allowed, f"its rotary scaling is made for {allowed}"
    return MOST_POSITIONS, "float32 tells no more positions apart"


def _allowed_by_scaling(config: PretrainedConfig) -> int | None:
    """Return the length that rotary scalings were made for, or None where none names one."""
    own, lengths = own_context(config), []
    for parameters in rotary_parameters(config).values():
        if parameters["rope_type"] in _MADE_FOR_A_LENGTH:
            original = parameters["original_max_position_embeddings"]
            factor = parameters.get("factor") or own / original
            lengths.append(max(own, int(factor * original)))
    return min(lengths, default=None)
