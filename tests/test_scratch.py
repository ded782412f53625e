"""Tensors on disk: mapped, shared where they were shared, and without a name."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rk_export import scratch
from rk_export.scratch import mapped, settle

LARGE = (512, 256)


def resident() -> dict[str, int]:
    """Return the memory of this process in kB by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if name[:3] == "Rss"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64])
def test_copies_have_the_values_and_leave_no_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "turned": torch.arange(12).reshape(3, 4).to(dtype).T,
        "number": torch.tensor(7).to(dtype),
        "nothing": torch.empty(0, 3).to(dtype),
    }
    copies = mapped(tensors, tmp_path)
    assert os.listdir(tmp_path) == []
    assert copies.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert copies[name].dtype is dtype
        assert torch.equal(copies[name], tensor)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, mode: str) -> Any:
        os.close(handle)
        return open("/dev/full", mode)

    monkeypatch.setattr("rk_export.scratch.os.fdopen", full)
    with pytest.raises(OSError, match="No space left on device") as failed:
        mapped({"ones": torch.ones(LARGE)}, tmp_path)
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_what_was_mapped_can_be_changed(tmp_path: Path) -> None:
    ones = torch.ones(LARGE)
    copy = mapped({"ones": ones}, tmp_path)["ones"]
    copy += 1
    assert float(copy.sum()) == 2 * ones.numel()
    assert float(ones.sum()) == ones.numel()


def test_a_module_that_settles_stays_what_it_is(tmp_path: Path) -> None:
    embedding, head = nn.Embedding(*LARGE), nn.Linear(LARGE[1], LARGE[0])
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head, "norm": nn.LayerNorm(8)})
    model.register_buffer("table", torch.randn(LARGE))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norm = model["norm"].weight.data_ptr()
    settle(model, tmp_path)
    assert head.weight is embedding.weight
    assert model["norm"].weight.data_ptr() == norm  # too small to be worth a place on disk
    assert all(scratch._in_file(tensor.data_ptr()) for tensor in (embedding.weight, model.table))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_lies_in_a_file_already_stays_there(tmp_path: Path) -> None:
    linear = nn.Linear(*LARGE, bias=False)
    settle(linear, tmp_path)
    place = linear.weight.data_ptr()
    settle(linear, tmp_path, untouched=True)
    assert linear.weight.data_ptr() == place
    linear.weight.data.mul_(2)
    settle(linear, tmp_path)
    assert linear.weight.data_ptr() != place


def test_mapped_tensors_take_no_memory_of_the_process(tmp_path: Path) -> None:
    linear = nn.Linear(4096, 8192, bias=False)
    linear.weight.data.fill_(1)
    with_weights = resident()["RssAnon"]
    settle(linear, tmp_path)
    assert float(linear.weight.sum()) == linear.weight.numel()
    assert with_weights - resident()["RssAnon"] > 0.9 * linear.weight.nbytes / 1024


def in_file(tensor: torch.Tensor) -> bool:
    return scratch._in_file(tensor.data_ptr())


def test_parameters_that_a_module_is_given_move_to_disk(tmp_path: Path) -> None:
    module, small = nn.Linear(LARGE[1], LARGE[0], bias=False), nn.Parameter(torch.ones(3))
    weight = nn.Parameter(torch.randn(LARGE))
    values = weight.detach().clone()
    with scratch.settling(tmp_path):
        module.weight = weight
        module.bias = small
    assert in_file(module.weight)
    assert torch.equal(module.weight, values)
    assert not in_file(module.bias)
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    module.weight = nn.Parameter(torch.randn(LARGE))
    assert not in_file(module.weight), "outside the context nothing moves"


def test_a_parameter_that_lies_in_a_file_already_is_not_copied(tmp_path: Path) -> None:
    module, stored = (
        nn.Linear(LARGE[1], LARGE[0], bias=False),
        scratch.laid_down(torch.randn(LARGE), tmp_path),
    )
    with scratch.settling(tmp_path):
        module.weight = nn.Parameter(stored)
    assert module.weight.data_ptr() == stored.data_ptr()


def test_a_tensor_is_kept_on_disk_unless_it_is_small(tmp_path: Path) -> None:
    large, small = torch.randn(LARGE), torch.randn(3)
    copy = scratch.laid_down(large, tmp_path)
    assert in_file(copy)
    assert torch.equal(copy, large)
    assert scratch.laid_down(small, tmp_path) is small
