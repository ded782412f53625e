"""Principal angles and defects against cases whose values are known."""

from __future__ import annotations

import math

import pytest
import torch
from papers.joint_rank.subspaces import (
    largest_defect,
    principal_angles,
    row_basis,
)

from rk_export.passes.numerics.joint_svd import orthogonality_defect


def rotated(angles: list[float], size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two orthonormal row bases with these principal angles, in random coordinates."""
    count = len(angles)
    frame = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator())).Q
    turn = torch.tensor(angles, dtype=torch.float64)[:, None]
    return frame[:count], turn.cos() * frame[:count] + turn.sin() * frame[count : 2 * count]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_known_angles_come_back_small_ones_too() -> None:
    expected = [0.0, 1e-9, 1e-4, 0.3, 1.2, math.pi / 2]
    first, second = rotated(expected)
    found = principal_angles(first, second)
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_angles_are_of_the_spans_not_of_the_bases() -> None:
    first, second = rotated([0.2, 0.7])
    mix = torch.tensor([[3.0, 1.0], [-2.0, 0.5]], dtype=torch.float64)
    assert torch.allclose(principal_angles(mix @ first, second), principal_angles(first, second), atol=1e-12)


def test_spaces_of_different_dimension() -> None:
    first, second = rotated([0.1, 0.4, 0.9])
    angles = principal_angles(first[1:2], second)
    assert angles.tolist() == pytest.approx([0.4])
    assert torch.equal(principal_angles(second, first[1:2]), angles)
    assert float(principal_angles(first[:1], first)[0]) < 1e-12


def test_defects() -> None:
    basis, _ = rotated([0.0, 0.0, 0.0])
    assert largest_defect(basis) < 1e-12
    stretched = basis * torch.tensor([[1.0], [2.0], [1.0]])
    assert largest_defect(stretched) == pytest.approx(3.0)
    assert orthogonality_defect(stretched) == pytest.approx(3.0)
    slanted = basis.clone()
    slanted[0] += 0.1 * basis[1]
    assert largest_defect(slanted) == pytest.approx(0.1)


def test_more_rows_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="4 rows"):
        row_basis(torch.randn(4, 3, generator=generator()))
