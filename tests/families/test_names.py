"""Every family in the names that transformers writes today and in those of its conversion mapping: the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from family_runs import families, record, sampled
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.source.stored import StoredModel, open_source
from rk_export.source.tensor_files import SafetensorFiles

SPELLINGS = {"as published": True, "as the modules are called": False}


def canonical(model: PreTrainedModel, source: StoredModel) -> dict[str, Tensor]:
    """Return the tensors of a model whose layers are brought into our form."""
    own = copy.deepcopy(model)
    for layer in own.get_submodule(source.architecture.layers).children():
        source.architecture.canonicalize(layer)
    return dict(own.state_dict())


def _exported(source: StoredModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without those of modules that are exported nowhere, such as an encoder's pooler."""
    unused = tuple(f"{module}." for module in source.architecture.unused)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}


@pytest.mark.parametrize("name", sampled(families(), 4))
def test_both_spellings_give_the_same_tensors(name: str, tmp_path: Path) -> None:
    model, stored = tiny_model(name), {}
    for spelling, original in SPELLINGS.items():
        folder = tmp_path / spelling
        model.save_pretrained(folder, save_original_format=original)
        stored[spelling] = set(SafetensorFiles(folder.glob("*.safetensors")).shapes)
        source = open_source(folder)
        expected, found = (
            _exported(source, tensors) for tensors in (canonical(model, source), source.load().state_dict())
        )
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), f"{key}, {spelling}"
    renamed = len(stored["as published"] - stored["as the modules are called"])
    record(name, "names", {"stored": len(stored["as published"]), "otherwise in the model": renamed})


@pytest.mark.parametrize("name", sampled(families(), 4))
def test_a_layer_reads_its_own_tensors_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    read: list[str] = []
    reading = SafetensorFiles.read
    monkeypatch.setattr(SafetensorFiles, "read", lambda self, key: read.append(key) or reading(self, key))
    skeleton, of_layer = source.skeleton(), []
    for index in range(source.layer_count):
        read.clear()
        source.load_layer(skeleton, index)
        of_layer.append(set(read))
    assert all(of_layer)
    assert len(set.union(*of_layer)) == sum(map(len, of_layer)), "a tensor was read for two layers"
