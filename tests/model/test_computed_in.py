"""A model that converts its tensors while it runs computes what a converted copy computes, and stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from rk_export.model.computed_in import computing_in
from rk_export.model.torch_logits import torch_logits

TOKENS = torch.arange(3, 23)[None].numpy()


# transformers' joined experts have no kernel for float64.
CASES = [(family, torch.float16) for family in FAMILIES] + [
    (family, torch.float64) for family in FAMILIES if family not in ("mixtral", "qwen3_moe")
]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_it_computes_what_a_copy_computes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).eval()
    before = copy.deepcopy(model.state_dict())
    expected = torch_logits(copy.deepcopy(model).to(dtype))(TOKENS)
    with computing_in(model, dtype):
        found = torch_logits(model)(TOKENS)
    assert found.dtype is dtype
    assert torch.equal(found, expected)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype is tensor.dtype for name, tensor in before.items())


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


def test_what_fails_gets_its_tensors_back_and_bytes_stay_bytes() -> None:
    module = Broken(3, 2)
    module.register_buffer("codes", torch.zeros(2, dtype=torch.uint8))
    with computing_in(module, torch.float64), pytest.raises(RuntimeError, match="broken"):
        module(torch.zeros(1, 3))
    assert module.weight.dtype is torch.float32
    assert module.codes.dtype is torch.uint8
