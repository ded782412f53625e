"""Compressed PyTorch checkpoints: an HF-style folder whose config carries the plan that shaped the model."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rk_export.errors import InputError
from rk_export.folders import AtomicFolder
from rk_export.inside import copy_inside
from rk_export.model.architecture import Architecture
from rk_export.model.description import describe, reads_types
from rk_export.model.preparable import has_rotated_head
from rk_export.passes.modules.quantized import RotatedHead
from rk_export.plan import Plan
from rk_export.planning.planner import check_sites
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.empty_layers import empty_layer, empty_tables
from rk_export.runtime.bundle_files import read_json
from rk_export.source.sentence_head import copy_sentence_files
from rk_export.source.stored import read_config
from rk_export.source.tokenizer_files import copy_tokenizer
from rk_export.source.weight_files import open_tensors

SECTION = "rk_export"
GENERATION_FILE = "generation_config.json"
CHECKPOINT_VERSION = 1


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a compressed checkpoint."""
    try:
        return SECTION in read_json(folder / "config.json")
    except InputError:
        return False


def save_pretrained(rewritten: Rewritten, folder: Path, *, tokenizer_from: Path, force: bool = False) -> None:
    """Write a compressed model as safetensors, config with a versioned section, generation config and tokenizer.

    Raises:
        InputError: If the folder exists and `force` is not set, or the disk is full.
    """
    with AtomicFolder(folder, force=force) as partial:
        save_torch_state_dict(_stored_tensors(rewritten), partial)
        config = rewritten.model.config.to_dict()
        config[SECTION] = {"version": CHECKPOINT_VERSION, "plan": rewritten.plan.to_json()}
        copy_tokenizer(tokenizer_from, partial, types=reads_types(rewritten.model.config))
        copy_sentence_files(tokenizer_from, partial)
        if (tokenizer_from / GENERATION_FILE).is_file():  # it may name other ends than the config
            copy_inside(tokenizer_from, GENERATION_FILE, partial)
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_pretrained(folder: Path) -> Rewritten:
    """Load a compressed checkpoint; nothing is factorized or quantized anew.

    Raises:
        InputError: If the folder is no compressed checkpoint of this version, or a tensor is missing.
    """
    config = read_config(folder)
    plan = _read_plan(folder)
    description = describe(config)
    check_sites(description, plan)
    architecture, model = description.architecture, description.canonical_model()
    for index in range(description.layer_count):
        model.set_submodule(f"{architecture.layers}.{index}", empty_layer(description, plan, index).module)
    if architecture.lm_head and has_rotated_head(description, plan.recipe.preparations):
        size, head = config.hidden_size, model.get_submodule(architecture.lm_head)
        rotation = nn.Linear(size, size, bias=False, device="meta")
        model.set_submodule(architecture.lm_head, RotatedHead(rotation, head))
    empty_tables(model, architecture, plan.table)
    _fill(model, architecture, folder)
    return Rewritten(model, description, plan, findings=())


def _read_plan(folder: Path) -> Plan:
    where = str(folder / "config.json")
    section = read_json(folder / "config.json").get(SECTION)
    if not isinstance(section, dict) or section.get("version") != CHECKPOINT_VERSION:
        raise InputError(
            f"no {SECTION} section of version {CHECKPOINT_VERSION}",
            where=where,
            fix="name a folder that rk-export saved",
        )
    return Plan.from_json(section.get("plan"), where=where)


def _fill(model: PreTrainedModel, architecture: Architecture, folder: Path) -> None:
    stored = open_tensors(folder)
    tensors = {name: stored.read(name) for name in stored.shapes}
    if _is_tied(model.config) and architecture.lm_head:
        twins = {name for name in tensors if name.startswith(architecture.embedding + ".")}
        for name in twins:
            tensors[_tied_path(model, architecture) + name.removeprefix(architecture.embedding)] = tensors[
                name
            ]
    if missing := [name for name in model.state_dict() if name not in tensors]:
        raise InputError(
            f"tensor {missing[0]!r} is missing", where=str(folder), fix="save the checkpoint again"
        )
    for name, empty in model.state_dict().items():
        if tensors[name].shape != empty.shape:
            raise InputError(
                f"tensor {name!r} has shape {list(tensors[name].shape)}, the plan asks for {list(empty.shape)}",
                where=str(folder),
                fix="config.json and the weights do not belong together",
            )
    model.load_state_dict(tensors, assign=True)
    if _is_tied(model.config) and architecture.lm_head:
        head, embedding = (
            model.get_submodule(path) for path in (_tied_path(model, architecture), architecture.embedding)
        )
        if isinstance(head, nn.Linear):
            head.weight = embedding.weight  # one parameter again: exporting stores it once
    model.requires_grad_(False)


def _stored_tensors(rewritten: Rewritten) -> dict[str, Tensor]:
    """Return the state dict without the tied copy of the embedding."""
    model = rewritten.model
    drop = (
        f"{_tied_path(model, rewritten.architecture)}."
        if rewritten.architecture.lm_head and _is_tied(model.config)
        else None
    )
    state: dict[str, Tensor] = model.state_dict()
    return {
        name: tensor.contiguous() for name, tensor in state.items() if not (drop and name.startswith(drop))
    }


def _tied_path(model: PreTrainedModel, architecture: Architecture) -> str:
    """Return the path of the output projection that shares the embedding's table."""
    path = str(architecture.lm_head)
    return f"{path}.head" if isinstance(model.get_submodule(path), RotatedHead) else path


def _is_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))
