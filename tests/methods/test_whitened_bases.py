"""Directions of a matrix under the second moment of its inputs, and the selection that starts from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.basel.selection import select_basis
from rk_export.options.ranks import RankRule
from rk_export.options.texts import TextFile
from rk_export.passes.numerics.basis import directions
from rk_export.passes.numerics.metric import Metric
from rk_export.source.stored import StoredModel


def test_whitened_directions_are_the_matrix_and_lose_least_of_its_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    x = torch.randn(500, 20, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 20)
    C = x.T @ x / len(x)
    errors = {}
    for name, metric in (("plain", None), ("whitened", Metric.of(C, damping=1e-9))):
        found = directions(W, metric)
        assert torch.allclose(found.left * found.values @ found.right, W, atol=1e-6)
        cut = found.left[:, :6] * found.values[:6] @ found.right[:6]
        errors[name] = float(((W - cut) @ x.T).norm())
    best = torch.linalg.svdvals(W @ torch.linalg.cholesky(C))[6:].norm() * len(x) ** 0.5
    assert abs(errors["whitened"] - float(best)) < 1e-3 * float(best)
    assert errors["whitened"] < 0.5 * errors["plain"]


def test_a_selection_from_whitened_bases_keeps_its_share(source_of: Callable[..., StoredModel]) -> None:
    source = source_of("qwen2")
    tokens = torch.randint(3, 160, (8, 32), generator=torch.Generator().manual_seed(0))
    kept = {}
    task = TextFile("task.txt", "0" * 64)
    both: tuple[Literal["plain", "whitened"], ...] = ("plain", "whitened")
    for bases in both:
        options = BaselOptions(task, keep=0.6, steps=6, batch_tokens=64, new_basis=2, events=3, bases=bases)
        selection = select_basis(source, tokens, RankRule("keep", 0.6), options, device=torch.device("cpu"))
        details = selection.finding.details or {}
        assert details["kept"] <= 0.6
        assert details["bases"] == bases
        kept[bases] = selection.tensors["layers.0.self_attn.q_proj.weight"]
    assert not torch.allclose(kept["plain"], kept["whitened"])
