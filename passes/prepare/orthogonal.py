"""Seeded orthogonal matrices that spread outliers over all coordinates (QuaRot, 2404.00456)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.threads import one_thread

# A Hadamard matrix is applied as a Kronecker product of factors of at most this size.
LARGEST_FACTOR = 64
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Orthogonal:
    """Q = diag(signs) (F_1 ⊗ F_2 ⊗ ...), applied factor by factor: d Σ n_i operations a row instead of d².

    Args:
        signs: Random signs (d,), float64. They come first, so that the mixing differs with the seed.
        factors: Orthogonal F_i (n_i, n_i), float64; the product of the n_i is d.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    def right(self, rows: Tensor) -> Tensor:
        """Return `rows` Q (n, d), computed in float64 and given back in the dtype and on the device of `rows`."""
        result = torch.empty_like(rows)
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            result[begin : begin + ROWS_AT_ONCE] = self._apply(rows[begin : begin + ROWS_AT_ONCE])
        return result

    def left(self, matrix: Tensor) -> Tensor:
        """Return Qᵀ `matrix` (d, n)."""
        return self.right(matrix.T).T

    def matrix(self) -> Tensor:
        """Return Q (d, d) in float64."""
        return self.right(torch.eye(len(self.signs), dtype=torch.float64, device=self.signs.device))

    def _apply(self, rows: Tensor) -> Tensor:
        mixed = rows.double() * self.signs.to(rows.device)
        for factor in self.factors:
            # The first axis is contracted and comes back as the last: after all factors the order is restored.
            parts = mixed.view(len(rows), len(factor), -1).transpose(1, 2).reshape(-1, len(factor))
            mixed = (parts @ factor.to(rows.device)).view(len(rows), -1)
        return mixed


def orthogonal(size: int, generator: torch.Generator) -> Orthogonal:
    """Return a random orthogonal matrix: Hadamard in the power-of-two part of its size, Haar in the odd part."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    factors = hadamard_factors(size // odd)
    return Orthogonal(signs, (*factors, haar(odd, generator)) if odd > 1 else factors)


def hadamard_factors(size: int) -> tuple[Tensor, ...]:
    """Return normalized Hadamard matrices whose Kronecker product is the one of `size`, a power of two."""
    exponent, step = size.bit_length() - 1, LARGEST_FACTOR.bit_length() - 1
    exponents = [step] * (exponent // step) + ([exponent % step] if exponent % step else [])
    return tuple(_hadamard(item) for item in exponents)


@one_thread()
def haar(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal (size, size) matrix drawn uniformly, float64."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    drawn: Tensor = q * r.diagonal().sign()
    return drawn


def _hadamard(exponent: int) -> Tensor:
    base = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    result = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(exponent):
        result = torch.kron(result, base)
    return result
