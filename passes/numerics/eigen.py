"""Symmetric eigenproblems and products on CPU through SciPy's LAPACK and BLAS, on other devices through PyTorch.

The MKL inside PyTorch's CPU builds is slow on some processors: on an AMD EPYC its eigendecomposition of a
4096 x 4096 matrix took eight times as long as SciPy's, its matrix product 1.6 times.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import blas, eigvalsh, lapack
from torch import Tensor

from rk_export.passes.numerics.threads import one_thread


def gram_matrix(W: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return WᵀW (in, in) in `dtype`; on CPU by a symmetric rank-k update, half the work of a product.

    Only the lower triangle is meaningful on CPU: the functions below read no more.
    """
    wide = W.to(dtype)
    if wide.device.type != "cpu":
        return wide.T @ wide
    syrk = blas.dsyrk if dtype is torch.float64 else blas.ssyrk
    return torch.from_numpy(syrk(1.0, wide.contiguous().numpy().T, lower=1))


def product(A: Tensor, B: Tensor) -> Tensor:
    """Return A B."""
    if A.device.type != "cpu":
        return A @ B
    return torch.from_numpy(np.matmul(A.numpy(), B.numpy()))


@one_thread()
def eigenvalues(gram: Tensor) -> Tensor:
    """Return the eigenvalues, ascending, of a symmetric matrix given by its lower triangle."""
    if gram.device.type != "cpu":
        values: Tensor = torch.linalg.eigvalsh(gram, UPLO="L")
        return values
    return torch.from_numpy(eigvalsh(gram.numpy(), lower=True, check_finite=False))


@one_thread()
def leading_eigenvectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues, ascending, and the eigenvectors (n, count) of the largest ones, in that order.

    On CPU: reduction to tridiagonal form, divide and conquer there, and the way back for the wanted vectors
    only, which spares a quarter of a complete decomposition.

    Args:
        gram: A symmetric matrix (n, n) given by its lower triangle.
        count: How many eigenvectors.

    Raises:
        RuntimeError: If divide and conquer does not converge.
    """
    size = gram.shape[0]
    if gram.device.type != "cpu" or size < 3:
        values, vectors = torch.linalg.eigh(gram, UPLO="L")
        return values, vectors[:, size - count :]
    names = ("sytrd", "stevd", "ormqr", "sytrd_lwork")
    sytrd, stevd, ormqr, sytrd_lwork = lapack.get_lapack_funcs(names, dtype=gram.numpy().dtype)
    work = int(sytrd_lwork(size, lower=1)[0].real)
    reflectors, diagonal, off_diagonal, tau, _ = sytrd(gram.numpy(), lower=1, lwork=work)
    values, inner, info = stevd(diagonal, off_diagonal)
    if info != 0:
        raise RuntimeError(
            f"the eigenvalues of a {size} x {size} Gram matrix did not converge (stevd: {info})"
        )
    vectors = np.asfortranarray(inner[:, size - count :])
    # The orthogonal factor leaves the first coordinate alone; the others carry the reflectors.
    below = np.asfortranarray(reflectors[1:, :-1])
    rest = np.asfortranarray(vectors[1:])
    vectors[1:], _, _ = ormqr("L", "N", below, tau, rest, lwork=64 * count)
    return torch.from_numpy(values), torch.from_numpy(vectors)
