"""Logits of a model as transformers itself loads and computes it: the reference that is not ours."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from rk_export.errors import InputError
from rk_export.memory import available_memory
from rk_export.model.torch_logits import torch_logits
from rk_export.report.humanize import size
from rk_export.source.quiet import transformers_quiet
from rk_export.source.stored import StoredModel

logger = logging.getLogger(__name__)

# Beside the weights in float32 stand the file's pages, the activations and one tensor in its stored type.
_ROOM = 1.2
_OPTIONS = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}


@dataclass(frozen=True)
class Reference:
    """What transformers computes.

    Args:
        logits: (1, length, width), or None where it was not computed.
        note: What was loaded, or why nothing was.
    """

    logits: Tensor | None
    note: str


def transformers_logits(source: StoredModel, tokens: Tensor) -> Reference:
    """Return the logits of one prompt as transformers computes them in float32 with its eager attention.

    The model is loaded by `from_pretrained` from its folder. Where that is another model (an adapter is merged, the
    matrices are stored quantized) or transformers does not find every tensor there, its class is filled by name with
    the tensors as we read them, and the note says so.

    Args:
        source: The untouched dense model.
        tokens: One prompt, int64 (1, length).

    Raises:
        InputError: If transformers cannot be filled completely either.
    """
    needed = needed_memory(source)
    available = available_memory()
    if available is not None and needed > available:
        reason = f"transformers needs {size(needed)} for the whole model, {size(available)} are free"
        logger.warning("not compared with transformers: %s", reason)
        return Reference(None, reason)
    with transformers_quiet():
        model, note = _whole_model(source)
    return Reference(torch_logits(model)(tokens.numpy()).float(), note)


def needed_memory(source: StoredModel) -> int:
    """Return the bytes that must be free for a comparison: the whole model in float32, and some room."""
    return round(_ROOM * 4 * source.parameter_count())


def _whole_model(source: StoredModel) -> tuple[PreTrainedModel, str]:
    reason = source.changed
    if not reason:
        try:
            model = _from_folder(source)
            return model, f"{type(model).__name__}.from_pretrained"
        except InputError as error:
            reason = error.what
    model = _filled(source)
    note = f"{type(model).__name__} filled by name with the tensors as rk-export read them: {reason}"
    logger.warning("%s", note)
    return model, note


def _from_folder(source: StoredModel) -> PreTrainedModel:
    auto = AutoModel if source.architecture.is_encoder else AutoModelForCausalLM
    return _complete(
        source,
        lambda: auto.from_pretrained(
            source.origin[0], use_safetensors=True, local_files_only=True, trust_remote_code=False, **_OPTIONS
        ),
    )


def _filled(source: StoredModel) -> PreTrainedModel:
    family = type(source.description.canonical)
    tensors = {name: source.tensor(name) for name in source.stored.shapes}
    config = copy.deepcopy(source.config)
    return _complete(
        source,
        lambda: family.from_pretrained(
            None, config=config, state_dict=tensors, trust_remote_code=False, **_OPTIONS
        ),
    )


def _complete(source: StoredModel, load: Callable[[], tuple[Any, dict[str, Any]]]) -> PreTrainedModel:
    """Load a model, and refuse one that transformers had to complete with random tensors."""
    try:
        model, info = load()
    except InputError:
        raise
    except Exception as error:  # the classes raise whatever their first use of a wrong value does
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"transformers cannot load it ({type(error).__name__}: {reason})",
            where=source.name,
            fix="convert it with transformers: save_pretrained writes a folder that it reads",
        ) from error
    unused = source.architecture.unused
    missing = sorted(name for name in info["missing_keys"] if not (unused and name.startswith(unused)))
    if missing:
        raise InputError(
            f"transformers finds no tensor {missing[0]!r} and would start it at random",
            where=source.name,
            fix="the checkpoint is incomplete, or its tensors belong to another class: convert it",
        )
    result: PreTrainedModel = model.eval()
    return result
