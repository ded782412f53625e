"""Tensors on disk: what is given to a module moves there, and values stay."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rk_export import scratch

LARGE = (256, 256)


def in_file(tensor: torch.Tensor) -> bool:
    return scratch._in_file(tensor.data_ptr())


def test_parameters_that_a_module_is_given_move_to_disk(tmp_path: Path) -> None:
    module, small = nn.Linear(256, 256, bias=False), nn.Parameter(torch.ones(3))
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


def test_what_lies_in_a_file_already_is_not_copied(tmp_path: Path) -> None:
    module, stored = nn.Linear(256, 256, bias=False), scratch.kept(torch.randn(LARGE), tmp_path)
    with scratch.settling(tmp_path):
        module.weight = nn.Parameter(stored)
    assert module.weight.data_ptr() == stored.data_ptr()


def test_a_tensor_is_kept_on_disk_unless_it_is_small(tmp_path: Path) -> None:
    large, small = torch.randn(LARGE), torch.randn(3)
    copy = scratch.kept(large, tmp_path)
    assert in_file(copy)
    assert torch.equal(copy, large)
    assert scratch.kept(small, tmp_path) is small
