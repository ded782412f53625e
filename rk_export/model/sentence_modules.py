"""What sentence-transformers does to the hidden states of a model: the modules of ``modules.json``.

They turn the states of a text's tokens into one vector: pooling, dense layers, a norm, scaling to length 1. A bundle's
graph repeats them. A module or an option that the graph does not know is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.inside import checked_name
from rk_export.json_codec import load_json
from rk_export.model.description import ModelDescription
from rk_export.runtime.bundle_files import Section
from rk_export.runtime.sentence_files import MODULES_FILE, read_transformer_settings

WEIGHTS = "model.safetensors"
# Modes of pooling and the flags that older files have for them, in the order in which results are joined.
MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# Activation functions of dense layers by the last part of their torch names.
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "Sigmoid", "GELU", "SiLU")
_ALONE = f"remove {MODULES_FILE} from a copy of the folder: the bundle then gives hidden states only"
_VECTOR = "sentence_embedding"


@dataclass(frozen=True)
class Dense:
    """One dense layer on the vector.

    Args:
        folder: Where its weights lie, inside the model's folder.
        sizes: Elements that go in, and that come out.
        bias: Whether a bias is added.
        activation: One of `ACTIVATIONS`.
        residual: Whether the input is added to the result, through a matrix where the sizes differ.
    """

    folder: str
    sizes: tuple[int, int]
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class Norm:
    """A LayerNorm on the vector.

    Args:
        folder: Where its weights lie, inside the model's folder.
        size: Elements.
    """

    folder: str
    size: int


@dataclass(frozen=True)
class Normalize:
    """Scales the vector to length 1."""


@dataclass(frozen=True)
class SentenceModules:
    """What follows the hidden states.

    Args:
        pooling: Modes whose results are joined, of `MODES`.
        steps: What is done to the pooled vector, in order.
        width: Elements of the result.
    """

    pooling: tuple[str, ...]
    steps: tuple[Dense | Norm | Normalize, ...]
    width: int


def takes_modules(description: ModelDescription) -> bool:
    """Whether a model's graph gives hidden states that modules may follow; classifiers give logits."""
    return description.architecture.is_encoder and description.encoder.classifier is None


def read_sentence_modules(folder: Path, config: PretrainedConfig) -> SentenceModules | None:
    """Return the modules of a model folder, or None where it has no ``modules.json``.

    Raises:
        UnsupportedModelError: The graph cannot repeat one of them.
        InputError: A file is malformed.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return None
    kinds = _kinds(path)
    if [kind for kind, _ in kinds[:2]] != ["Transformer", "Pooling"]:
        found = ", ".join(kind for kind, _ in kinds) or "none"
        raise _refusal(f"its modules are {found}; a Transformer and a Pooling must come first", path)
    _check_transformer(folder, kinds[0][1])
    pooling, width = _pooling(folder, kinds[1][1], config)
    steps: list[Dense | Norm | Normalize] = []
    for kind, place in kinds[2:]:
        step = _step(kind, folder, place, width)
        if step is None:
            continue
        steps.append(step)
        width = step.sizes[1] if isinstance(step, Dense) else width
    return SentenceModules(pooling, tuple(steps), width)


def module_folders(path: Path) -> list[str]:
    """Return the folders of the modules that ``modules.json`` lists, those in the model's own folder left out.

    Raises:
        InputError: It is malformed, or names a place outside the folder.
    """
    return [place for _, place in _listed(path) if place]


def _listed(path: Path) -> list[tuple[str, str]]:
    """Return the type and the folder of each module."""
    listed = load_json(path, fix=_ALONE)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise InputError("no list of modules", where=str(path), fix=_ALONE)
    found = []
    for entry in listed:
        place = entry.get("path") or ""
        found.append((str(entry.get("type")), checked_name(place, where=str(path)) if place else ""))
    return found


def _kinds(path: Path) -> list[tuple[str, str]]:
    """Return the class and the folder of each module."""
    listed = _listed(path)
    for name, _ in listed:
        if not name.startswith("sentence_transformers."):
            raise _refusal(f"the module {name!r} is code of its own", path)
    return [(name.rpartition(".")[2], place) for name, place in listed]


def _check_transformer(folder: Path, place: str) -> None:
    if place:
        raise _refusal(f"its Transformer lies in {place!r}, not beside it", folder / MODULES_FILE)
    settings = read_transformer_settings(folder)
    if settings.values.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise _refusal(f"transformer_task is {settings.values['transformer_task']!r}", settings.where)


def _pooling(folder: Path, place: str, config: PretrainedConfig) -> tuple[tuple[str, ...], int]:
    """Return the modes of pooling and the elements of the pooled vector."""
    path = folder / place / "config.json"
    if not path.is_file():
        raise InputError("no such file, and modules.json names its folder", where=str(path), fix=_ALONE)
    values = Section.of_file(path)
    modes = values.values.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, flag in MODES.items() if values.flag(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes:
        raise _refusal("it names no mode of pooling", values.where)
    if unknown := [mode for mode in modes if mode not in tuple(MODES)]:
        raise _refusal(f"the pooling mode {unknown[0]!r} is not known", values.where)
    if values.flag("include_prompt") is False:
        raise _refusal(
            "include_prompt is false, and the graph cannot tell a prompt from a text", values.where
        )
    hidden = int(config.hidden_size)
    stated = values.count("embedding_dimension") or values.count("word_embedding_dimension") or hidden
    if stated != hidden:
        raise _refusal(f"it pools {stated} elements, the hidden states have {hidden}", values.where)
    return tuple(modes), len(modes) * hidden


def _step(kind: str, folder: Path, place: str, width: int) -> Dense | Norm | Normalize | None:
    """Return a module behind the pooling; None where it does nothing in inference."""
    values = (
        Section.of_file(folder / place / "config.json") if place else Section({}, str(folder / MODULES_FILE))
    )
    for name in ("module_input_name", "module_output_name"):
        if values.values.get(name) not in (None, _VECTOR):
            raise _refusal(f"{name} is {values.values[name]!r}", values.where)
    if kind == "Normalize":
        return Normalize()
    if kind == "Dropout":
        return None
    if kind == "LayerNorm":
        _check_width(values, "dimension", width)
        return Norm(place, width)
    if kind == "Dense":
        return _dense(values, folder, place, width)
    raise _refusal(f"the module {kind} cannot be put into the graph", folder / MODULES_FILE)


def _dense(values: Section, folder: Path, place: str, width: int) -> Dense:
    _check_width(values, "in_features", width)
    path = str(values.values.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise _refusal(f"activation_function is {path!r}; known are {', '.join(ACTIVATIONS)}", values.where)
    if not (folder / place / WEIGHTS).is_file():
        raise _refusal(f"its weights are not stored as {WEIGHTS}, and nothing else is read", folder / place)
    bias, residual = values.flag("bias"), values.flag("use_residual")
    out = values.count("out_features") or width
    return Dense(place, (width, out), bias is not False, activation, bool(residual))


def _check_width(values: Section, name: str, width: int) -> None:
    if (stated := values.count(name)) != width:
        raise _refusal(f"{name} is {stated}, the vector has {width} elements", values.where)


def _refusal(what: str, where: Any) -> UnsupportedModelError:
    return UnsupportedModelError(what, where=str(where), fix=_ALONE)
