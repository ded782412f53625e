"""Files of sentence-transformers beside a tiny model: pooling, dense layers with random weights, a norm, scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

IDENTITY = "torch.nn.modules.linear.Identity"


def write_modules(
    folder: Path,
    hidden: int,
    *,
    pooling: dict[str, Any] | None = None,
    steps: tuple[str | dict[str, Any], ...] = ("Normalize",),
    kind: str = "sentence_transformers.models",
) -> Path:
    """Write ``modules.json`` and what it names into a model's folder.

    Args:
        folder: The model's.
        hidden: Width of its hidden states.
        pooling: The pooling's config; None is the mean, as older files say it.
        steps: Behind the pooling: ``Normalize``, ``Dropout``, ``LayerNorm``, or the config of a dense layer.
        kind: In front of the modules' names.
    """
    width = hidden
    entries = [("", "Transformer"), ("1_Pooling", "Pooling")]
    stated = pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, **stated})
    modes = stated.get("pooling_mode")
    if isinstance(modes, list):
        width *= len(modes)
    elif modes is None:
        width *= max(
            1, sum(value is True for name, value in stated.items() if name.startswith("pooling_mode"))
        )
    for index, step in enumerate(steps, 2):
        name = step if isinstance(step, str) else "Dense"
        place = f"{index}_{name}"
        entries.append((place, name))
        if isinstance(step, dict):
            width = _write_dense(folder / place, width, step)
        elif step == "LayerNorm":
            _write(folder / place / "config.json", {"dimension": width})
            tensors = {"norm.weight": 1 + 0.2 * _random(width, seed=index), "norm.bias": _random(width)}
            save_file(tensors, folder / place / "model.safetensors")
    listed = [
        {"idx": index, "name": str(index), "path": place, "type": f"{kind}.{name}"}
        for index, (place, name) in enumerate(entries)
    ]
    _write(folder / "modules.json", listed)
    return folder


def _write_dense(place: Path, width: int, stated: dict[str, Any]) -> int:
    values = {"in_features": width, "out_features": width, "bias": True, "activation_function": IDENTITY}
    values |= stated
    _write(place / "config.json", values)
    out = int(values["out_features"])
    tensors = {"linear.weight": _random(out, width, seed=out)}
    if values["bias"]:
        tensors["linear.bias"] = _random(out)
    if values.get("use_residual") and out != width:
        tensors["residual.weight"] = _random(out, width, seed=out + 1)
    save_file(tensors, place / "model.safetensors")
    return out


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
