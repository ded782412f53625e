"""Logits of a model as transformers itself loads and computes it: the reference that is not ours.

transformers maps tensors of the type that they are stored in. They stay so, and each module widens its own to float32
while it runs: what a model that is loaded in float32 computes, bit for bit, in the memory of one module.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from rk_export.errors import InputError
from rk_export.model.computed_in import computing_in
from rk_export.model.torch_logits import torch_logits
from rk_export.model.torch_models import auto_class, empty_model
from rk_export.scratch import laid_down, settling
from rk_export.source.quiet import transformers_quiet
from rk_export.source.stored import StoredModel
from rk_export.source.tensor_files import FLOATS, SafetensorFiles

logger = logging.getLogger(__name__)

_OPTIONS = {"attn_implementation": "eager", "output_loading_info": True}
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Reference:
    """What transformers computes.

    Args:
        logits: (1, length, width).
        note: What was loaded.
    """

    logits: Tensor
    note: str


def transformers_logits(source: StoredModel, tokens: Tensor) -> Reference:
    """Return the logits of one prompt as transformers computes them in float32 with its eager attention.

    The model is loaded by `from_pretrained` from its folder; of a wrapper the whole is loaded, and reads text. Where
    that is another model (an adapter is merged, the matrices are stored quantized) or transformers does not find every
    tensor there, its class is filled by name with the tensors as we read them, and the note says so.

    Args:
        source: The untouched dense model.
        tokens: One prompt, int64 (1, length).

    Raises:
        InputError: If transformers cannot be filled completely either.
    """
    with transformers_quiet(), settling():
        model, note = _whole_model(source)
    stated = _stated_model(source)
    _take_buffers(model, empty_model(model.config, _auto_class(source)) if stated is None else stated)
    with computing_in(model, torch.float32):
        return Reference(torch_logits(model)(tokens.numpy()), note)


def _take_buffers(model: PreTrainedModel, empty: PreTrainedModel) -> None:
    """Give a model the tables and factors of a float32 model: its own depend on the type that it was loaded in."""
    exact, stored = dict(empty.named_buffers()), model.state_dict()
    for name, buffer in model.named_buffers():
        if name not in stored and buffer.is_floating_point():
            buffer.data = exact[name].data


def _whole_model(source: StoredModel) -> tuple[PreTrainedModel, str]:
    reason = source.changed
    if not reason:
        try:
            model = _from_folder(source)
            return model, f"{type(model).__name__}.from_pretrained"
        except InputError as error:
            reason = error.what
    model = _filled(
        source, {_outer(source, name): _Unread(source.tensor, name) for name in source.stored.shapes}
    )
    note = f"{type(model).__name__} filled by name with the tensors as rk-export read them: {reason}"
    logger.warning("%s", note)
    return model, note


def _from_folder(source: StoredModel) -> PreTrainedModel:
    """Load a model from its folder, in the type that its tensors are stored in.

    Where they are of several types, transformers gets them in float32 and by the names in the files.
    """
    files = SafetensorFiles(path for path in source.files if path.suffix == ".safetensors")
    types = set(files.types.values()) & FLOATS
    if len(types) > 1:
        return _filled(source, {name: _Unread(files.read, name) for name in files.shapes})
    return _complete(
        source,
        lambda: _auto_class(source).from_pretrained(
            source.origin[0],
            dtype=_TYPES[types.pop()],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **_OPTIONS,
        ),
    )


def _stated_model(source: StoredModel) -> PreTrainedModel | None:
    """Return the model that config.json states, without weights, where it is read as another one."""
    if source.wrapper is not None:
        return source.wrapper.model
    return None if source.taken is None else source.taken.model


def _auto_class(source: StoredModel) -> Any:
    if source.wrapper is not None:
        return AutoModelForMultimodalLM
    return auto_class(source.config)


def _outer(source: StoredModel, name: str) -> str:
    """Return the name of a tensor in the class that transformers fills."""
    return name if source.wrapper is None else source.wrapper.in_wrapper(name)


def _filled(source: StoredModel, tensors: dict[str, _Unread]) -> PreTrainedModel:
    empty = _stated_model(source) or source.description.canonical
    family, config = type(empty), copy.deepcopy(empty.config)
    # The tensors may say otherwise than config.json, or an adapter brings more words.
    config.tie_word_embeddings = source.config.tie_word_embeddings
    config.get_text_config().vocab_size = source.config.vocab_size
    return _complete(
        source,
        lambda: family.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            trust_remote_code=False,
            **_OPTIONS,
        ),
    )


class _Unread:
    """A tensor that transformers reads when it comes to it, as it reads slices of files; it is given mapped."""

    def __init__(self, read: Callable[[str], Tensor], name: str) -> None:
        self._read, self._name = read, name

    def __getitem__(self, index: object) -> Tensor:
        return laid_down(self._read(self._name).float())


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
    missing = sorted(name for name in info["missing_keys"] if _is_read(source, name))
    if missing:
        raise InputError(
            f"transformers finds no tensor {missing[0]!r} and would start it at random",
            where=source.name,
            fix="the checkpoint is incomplete, or its tensors belong to another class: convert it",
        )
    result: PreTrainedModel = model.eval()
    return result


def _is_read(source: StoredModel, name: str) -> bool:
    """Whether a parameter of transformers' class takes part in the logits of a text."""
    if source.wrapper is not None:
        return source.wrapper.is_of_text(name)
    unused = source.architecture.unused
    return not (unused and name.startswith(unused))
