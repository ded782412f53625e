"""What a config.json is read as: a known family, the text model in a wrapper, or a family under another name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from rk_export.model.families.registry import FAMILIES
from rk_export.model.unknown_families import TakenAs, taken_as
from rk_export.model.wrappers import Wrapper, wrapper_of
from rk_export.source.leftovers import check_kind
from rk_export.source.quiet import transformers_quiet
from rk_export.source.wrapped import check_wrapper


@dataclass(frozen=True)
class ReadAs:
    """The model that a folder is read as.

    Args:
        config: Of a known family.
        wrapper: The whole that it is the text model of; None where it stands alone.
        taken: How its type was found to be that family; None where the type is the family's own.
    """

    config: PretrainedConfig
    wrapper: Wrapper | None = None
    taken: TakenAs | None = None


def read_as(config: PretrainedConfig, path: Path) -> ReadAs:
    """Return what a config is read as.

    Args:
        config: As transformers read it.
        path: Its file, for messages.

    Raises:
        InputError: If the model has a head of another kind, or a size in it is below one.
        UnsupportedModelError: If it is of no known family, and holds none.
    """
    if (wrapper := wrapper_of(config)) is not None:
        check_wrapper(wrapper, path)
        return ReadAs(wrapper.text, wrapper=wrapper)
    if config.model_type in FAMILIES:
        check_kind(config)
        return ReadAs(config)
    with transformers_quiet():  # it warns of what the values of one class would mean to another
        taken = taken_as(config)
    check_kind(config)
    return ReadAs(taken.config, taken=taken)
