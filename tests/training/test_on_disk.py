"""Trained matrices, gradients and moments on disk: the steps are those of memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rk_export.scratch import _in_file
from rk_export.training import on_disk
from rk_export.training.on_disk import OnDisk


def _train(model: nn.Sequential, *, disk: bool, steps: int = 4) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    kept = OnDisk(dict(model.named_parameters())) if disk else None
    if kept is not None:
        kept.keep_moments(optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for _ in range(2):  # gradients are accumulated
            model[: 1 + step % 2](torch.randn(5, 32, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_steps_are_those_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second matrix has no gradient in every other step: then it stays where it is."""
    monkeypatch.setattr(on_disk, "SMALLEST", 1)
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 8))
    there = copy.deepcopy(here)
    _train(here, disk=False)
    optimizer = _train(there, disk=True)
    for name, parameter in there.named_parameters():
        assert torch.equal(parameter, here.get_parameter(name))
        moments: list[Tensor] = [optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")]
        assert [_in_file(item.data_ptr()) for item in (parameter, *moments)] == [parameter.ndim > 1] * 3


def test_a_gradient_is_moved_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "SMALLEST", 1)
    linear = nn.Linear(16, 16)
    kept = OnDisk({"weight": linear.weight})
    linear(torch.ones(16)).sum().backward()
    assert linear.weight.grad is not None
    assert _in_file(linear.weight.grad.data_ptr())
    kept.release()
    linear.weight.grad = None
    linear(torch.ones(16)).sum().backward()
    assert linear.weight.grad is not None
    assert not _in_file(linear.weight.grad.data_ptr())


def test_moments_of_an_earlier_run_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "SMALLEST", 1)
    model = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 8))
    state = copy.deepcopy(_train(model, disk=False).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    kept = OnDisk(dict(model.named_parameters()))
    kept.keep_moments(optimizer)
    optimizer.load_state_dict(state)
    kept.keep_moments(optimizer)
    for number, parameter in enumerate(model.parameters()):
        own, earlier = optimizer.state[parameter], state["state"][number]
        assert all(torch.equal(own[kind], earlier[kind]) for kind in ("step", "exp_avg", "exp_avg_sq"))
