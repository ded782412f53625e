"""Candidates of global rank and sparsity optimization (2505.03801): every matrix split into low rank and sparse.

Robust principal components give W ~ L + S. A singular direction of L may be kept or left out, at the price of its
two factor columns, and so may every entry of S. All candidates of a model stand in one flat list, matrix by
matrix, the directions of a matrix before its entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rk_export.matrix_id import MatrixId
from rk_export.methods.sparse_sites import Prices, check_source, linear_shapes, on_disk
from rk_export.passes.base import Layer
from rk_export.passes.numerics.joint_svd import right_subspace
from rk_export.passes.numerics.knapsack import largest_within
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, index_dtype
from rk_export.passes.numerics.rpca import GROWTH, START, rpca
from rk_export.progress import track
from rk_export.scratch import joined, kept, zeros
from rk_export.source.protocol import Source
from rk_export.tensor_cache import as_tensors, cache_file, from_tensors, read_tensors

CACHE_LIMIT = 8_000_000_000  # bytes; the pools of a model that may take more are not kept on disk
# What a dense parameter becomes in the pools at most, by measurement: 8 bytes of an entry, and factors.
_BYTES_A_PARAMETER = 12
# Singular values of L below this share of the largest are zeros of the thresholding.
_RANK_TOLERANCE = 1e-5
_VERSION = 2
_FIELDS = ("up", "down", "indices", "values")


@dataclass(frozen=True)
class Pool:
    """The candidates of one matrix.

    Args:
        parts: L as U√σ and √σVᵀ, directions by falling σ, and the entries of S.
        residual: |W - L - S| / |W|.
    """

    parts: Parts
    residual: float = 0.0

    def __len__(self) -> int:
        return self.parts.rank + self.parts.entries

    @property
    def sigma(self) -> Tensor:
        """Singular values of L (r,), descending."""
        up, down = self.parts.up, self.parts.down
        sigma: Tensor = torch.linalg.vector_norm(up, dim=0) * torch.linalg.vector_norm(down, dim=1)
        return sigma

    def energies(self) -> Tensor:
        """Return the squared Frobenius norm of every candidate (candidates,), float32."""
        return torch.cat([self.sigma.square(), self.parts.values.square()])

    def prices(self, prices: Prices) -> Tensor:
        """Return the price of every candidate (candidates,), float32."""
        found = torch.full((len(self),), float(prices.entry), device=self.parts.values.device)
        found[: self.parts.rank] = prices.number * sum(self.parts.shape)
        return found

    def selected(self, taken: Tensor) -> Parts:
        """Return the parts that a mask over the candidates, bool (candidates,), leaves."""
        directions, entries = taken[: self.parts.rank], taken[self.parts.rank :]
        parts = self.parts
        return Parts(
            parts.up[:, directions], parts.down[directions], parts.indices[entries], parts.values[entries]
        )


Pools = Mapping[MatrixId, Pool]


def flat_prices(pools: Pools, prices: Prices) -> Tensor:
    """Return the prices of all candidates of a model (candidates,), float32, on disk."""
    return joined((pool.prices(prices) for pool in pools.values()), candidates(pools))


def candidates(pools: Pools) -> int:
    """Return how many candidates a model has."""
    return sum(map(len, pools.values()))


def taken_within(scores: Tensor, prices: Tensor, budget: float) -> Tensor:
    """Return which candidates `largest_within` takes: bool (candidates,), on disk."""
    return largest_within(scores, prices, budget, zeros(scores.shape, torch.bool, scores.device))


def by_place(pools: Pools, flat: Tensor) -> dict[MatrixId, Tensor]:
    """Return views of a tensor over all candidates (candidates,), matrix by matrix."""
    return dict(zip(pools, torch.split(flat, [len(pool) for pool in pools.values()]), strict=True))


def selected(pools: Pools, taken: Tensor) -> dict[MatrixId, Parts]:
    """Return the parts that a mask over all candidates, bool (candidates,), leaves; mapped."""
    return {place: on_disk(pools[place].selected(mask)) for place, mask in by_place(pools, taken).items()}


def make_pools(
    source: Source,
    iterations: int,
    device: torch.device,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[MatrixId, Pool]:
    """Split every matrix of the decoder layers, or read the pools of an earlier run, layer by layer.

    Args:
        source: The dense model.
        iterations: Of the alternating directions.
        device: Where matrices are split; the pools come to the CPU, and lie on disk.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.

    Raises:
        InputError: If the model is an encoder or has experts.
    """
    check_source(source, "cap")
    parameters = sum(rows * columns for rows, columns in linear_shapes(source).values())
    keep = parameters * _BYTES_A_PARAMETER <= CACHE_LIMIT
    pools: dict[MatrixId, Pool] = {}
    for index, known in _cached_pools(source, iterations, device, cache_dir, keep=keep):
        for item in source.description.projections(index):
            parts = Parts(*from_tensors(known, item.path, _FIELDS))
            pools[MatrixId(index, item.path)] = Pool(parts, float(known[f"{item.path}|residual"]))
    return pools


def _cached_pools(
    source: Source,
    iterations: int,
    device: torch.device,
    cache_dir: str | os.PathLike[str] | None,
    *,
    keep: bool,
) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """Yield the pools of every layer as tensors; weights are read where an earlier run left none."""
    key = {
        "model": source.fingerprint(cache_dir),
        "iterations": iterations,
        "start": START,
        "growth": GROWTH,
        "version": _VERSION,
    }
    files = (
        cache_file("cap-pools", {**key, "layer": index}, cache_dir) for index in range(source.layer_count)
    )
    known = [tensors for file in files if (tensors := read_tensors(file)) is not None]
    if len(known) == source.layer_count:
        yield from enumerate(known)
        return
    for layer in track(source.layers(), "splitting layers into low rank and sparse", source.layer_count):
        paths = [item.path for item in source.description.projections(layer.index)]
        make = partial(_pool_tensors, layer, paths, iterations, device)
        yield layer.index, kept("cap-pools", {**key, "layer": layer.index}, make, cache_dir, keep=keep)


def _pool_tensors(layer: Layer, paths: list[str], iterations: int, device: torch.device) -> dict[str, Tensor]:
    made = dict(_layer_pools(layer, paths, iterations, device))
    residuals = {f"{name}|residual": torch.tensor(pool.residual) for name, pool in made.items()}
    return as_tensors({name: pool.parts for name, pool in made.items()}, _FIELDS) | residuals


def _layer_pools(
    layer: Layer, paths: list[str], iterations: int, device: torch.device
) -> Iterator[tuple[str, Pool]]:
    """Yield the pools of a layer, matrices of one shape split together."""
    weights = {path: layer.linear(path).weight.detach().to(device, torch.float32) for path in paths}
    for shape in dict.fromkeys(weight.shape for weight in weights.values()):
        names = [path for path, weight in weights.items() if weight.shape == shape]
        stack = torch.stack([weights[path] for path in names])
        split = rpca(stack, iterations)
        sparse = split.exact_sparse(stack)
        for path, W, L, S in zip(names, stack, split.low, sparse, strict=True):
            yield path, pool_of(W, L, S)


def pool_of(W: Tensor, L: Tensor, S: Tensor) -> Pool:
    """Return the candidates of W (out, in), given its low-rank part L and its sparse part S; on the CPU."""
    subspace = right_subspace(L, min(L.shape))
    sigma = subspace.singular_values
    rank = int((sigma > _RANK_TOLERANCE * float(sigma[0])).sum()) if float(sigma[0]) > 0 else 0
    V = subspace.basis[:, :rank]
    root = sigma[:rank].sqrt()
    up, down = (L.to(V.dtype) @ V) / root, root[:, None] * V.T
    indices = S.flatten().nonzero()[:, 0]
    parts = Parts(
        up.float().contiguous().cpu(),
        down.float().contiguous().cpu(),
        indices.to(index_dtype((W.shape[0], W.shape[1]))).cpu(),
        S.flatten()[indices].float().cpu(),
    )
    residual = torch.linalg.vector_norm(W - L - S) / torch.linalg.vector_norm(W).clamp_min(1e-30)
    return Pool(parts, float(residual))
