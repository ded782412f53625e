"""How folders of tiny models are written and changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import (
    Edit,
    Tensors,
    edit_config,
    edit_tensors,
    prefixed,
    sharded,
    with_head,
)
from conftest import VOCABULARY, trained_tokenizer
from planted_code import Planted
from safetensors.torch import load_file
from tiny_models import tiny_model, transformers_own
from transformers import AutoModel

from input_cases.case import Build, Given

Change = Callable[[Path], object]


def saved(folder: Path, family: str = "llama", **fields: Any) -> Path:
    """Write a tiny model into a folder of its own and return that."""
    tiny_model(family, **fields).save_pretrained(folder / "model")
    return folder / "model"


def changed(*changes: Change, family: str = "llama", own: bool = False, **fields: Any) -> Build:
    """Return what writes a tiny model and changes its folder.

    Args:
        *changes: Each changes the folder.
        family: Family of the model.
        own: Compare with what transformers reads from the changed folder, not with the model that was saved.
        **fields: Config fields of the model.
    """

    def build(folder: Path) -> Given:
        model = saved(folder, family, **fields)
        for change in changes:
            change(model)
        return Given(model, lambda: transformers_own(model) if own else tiny_model(family, **fields))

    return build


def tensors(edit: Edit) -> Change:
    """Return what changes the tensors of a folder."""
    return lambda folder: edit_tensors(folder, edit)


def adding(name: str, *shape: int) -> Change:
    """Return what adds a tensor of ones."""
    return tensors(lambda stored: {**stored, name: torch.ones(shape)})


def without(name: str) -> Change:
    """Return what drops a tensor."""
    return tensors(lambda stored: {key: tensor for key, tensor in stored.items() if key != name})


def config(**fields: Any) -> Change:
    """Return what changes fields of config.json."""
    return lambda folder: edit_config(folder, **fields)


def head(factor: float) -> Change:
    """Return what stores a head that differs from the embedding by noise of this size."""
    return lambda folder: with_head(folder, "llama", factor)


def planted(kind: str, **fields: Any) -> Build:
    """Return what writes a model with code that leaves a file behind when it runs."""

    def build(folder: Path) -> Given:
        model = saved(folder, vocab_size=VOCABULARY)
        trained_tokenizer().save_pretrained(model)
        Planted(model, folder / "marker").plant(kind)
        edit_config(model, **fields)
        return Given(model, never=folder / "marker")

    return build


def index_of_a_missing_file(folder: Path) -> None:
    """Split the weights, write the index, and lose one file."""
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def lose_a_shard(folder: Path) -> None:
    sharded(folder)[1].unlink()


def renamed(name: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def two_files(folder: Path) -> None:
    renamed("a.safetensors")(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def backbone(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def adapter_weights_alone(folder: Path) -> None:
    renamed("adapter_model.safetensors")(folder)
    no_config(folder)


def two_models(stored: Tensors) -> Tensors:
    return prefixed("query.")(stored) | prefixed("passage.")(stored)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_nan(stored: Tensors) -> Tensors:
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    return stored


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
    (folder / "model.safetensors").write_text(text)


def web_page(folder: Path) -> None:
    (folder / "config.json").write_text("<!DOCTYPE html>")


def to(kind: torch.dtype, only: str = "") -> Change:
    return tensors(lambda stored: {name: t.to(kind) if only in name else t for name, t in stored.items()})


def grown(stored: Tensors) -> Tensors:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return stored | {name: torch.cat([stored[name], stored[name][:8]]) for name in names}


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
