"""What changes the files of a saved tiny model: JSON entries, tensors, names, shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], Tensors]
# The input embedding where it is not called model.embed_tokens.
EMBEDDING = {"gpt2": "transformer.wte.weight", "opt": "model.decoder.embed_tokens.weight"}


def change_json(path: Path, **changes: Any) -> None:
    """Change or add entries of an object in a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | changes), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change or add entries of config.json."""
    change_json(folder / "config.json", **changes)


def edit_tensors(folder: Path, edit: Edit) -> None:
    """Replace the tensors of model.safetensors."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in edit(tensors).items()},
        path,
        metadata={"format": "pt"},
    )


def with_head(folder: Path, family: str, factor: float) -> Path:
    """Store a head beside the embedding that config.json ties it to."""
    embedding = EMBEDDING.get(family, "model.embed_tokens.weight")
    noise = torch.randn(160, 64, generator=torch.Generator().manual_seed(5))
    edit_tensors(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding] + factor * noise})
    return folder


def prefixed(prefix: str) -> Edit:
    """Put a prefix before every name."""
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def inside(part: str) -> Edit:
    """Put a part into the names below every layer, as wrappers of single layers do."""
    return lambda tensors: {
        name.replace(".self_attn.", f".{part}.self_attn."): t for name, t in tensors.items()
    }


def multimodal(tensors: Tensors) -> Tensors:
    """Name tensors as a multimodal model of transformers 5 does."""
    return {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}


def sharded(folder: Path, count: int = 3, stem: str = "model", first: int = 1) -> list[Path]:
    """Distribute the tensors over numbered shards, without an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    paths = [folder / f"{stem}-{first + i:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        save_file({name: tensors[name] for name in sorted(tensors)[i::count]}, path)
    return paths
