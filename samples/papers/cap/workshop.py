"""The rows of the comparison: what each method leaves of the matrices, put into the model and evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from measure import harness
from measure.harness import Row
from torch import Tensor

from rk_export import (
    Budget,
    CalibrationOptions,
    CapOptions,
    EvalText,
    Factorize,
    Recipe,
    Run,
    SslcOptions,
    StoredModel,
    rewrite_model,
)
from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.baselines import magnitude, wanda
from rk_export.methods.cap.choose import most_probable
from rk_export.methods.cap.mixture import Mixtures, mixture_selection, offered_mixtures, refitted_parts
from rk_export.methods.cap.policy import Learned, first_probabilities, learn
from rk_export.methods.cap.pools import Pools, make_pools
from rk_export.methods.cap.scores import (
    Score,
    all_scores,
    curvature_score,
    directions_only,
    energy_score,
    largest_of_each,
    largest_scores,
)
from rk_export.methods.sparse_sites import PARAMETERS, Prices, amount_of, linear_shapes, over_dense
from rk_export.methods.sslc.choose import sslc_parts
from rk_export.passes.numerics.gaps import encode_gaps
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, split_columns

KEPT = (0.8, 0.5)
# The search from energies is run at this share only.
ENERGY_KEPT = 0.5
DENSE, WHOLE = "dense", "split"
POLICY, AUCTION, BLIND_POLICY, ENERGY, MIXTURE = "policy", "auction", "policy-energy", "energy", "mixture"
SSLC = "sslc"
TITLES = {
    DENSE: "dense",
    WHOLE: "RPCA split, all of it",
    POLICY: "CAP: policy gradient, from curvature",
    AUCTION: "CAP's candidates by curvature (auction; the policy's start)",
    "policy-refitted": "CAP: policy gradient, low rank refitted",
    "auction-refitted": "CAP's candidates by curvature, low rank refitted",
    BLIND_POLICY: "CAP: policy gradient, from energies",
    ENERGY: "CAP's candidates by energy (that policy's start)",
    "split-each": "CAP's candidates by energy, each matrix alike",
    MIXTURE: "rk-export: auction over fitted mixtures",
    SSLC: "SSLC under one allocation, entries refitted",
    "low-rank-pool": "low rank alone: CAP's directions by curvature",
    "low-rank-svd": "low rank alone: SVD under curvature, planned",
    "magnitude-global": "magnitude, all matrices together",
    "magnitude-matrix": "magnitude, each matrix alike",
    "wanda": "Wanda, each row alike",
}
# A search, and what it starts from.
SEARCHES = {POLICY: AUCTION, BLIND_POLICY: ENERGY}
# Stored in half precision: a factor's number, an entry with its gap byte, a number of a dense column.
HALF = Prices(2, 3, 2)


SINGLE = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Workshop:
    """What all rows share; each part is made when it is first needed.

    Args:
        model: What the dense model is called.
        source: It.
        calibration: The text of statistics and policy.
        options: Of CAP; every row has a share of its own.
        text: Where perplexity is measured.
        device: Where matrices are split and the model runs.
    """

    model: Path
    source: StoredModel
    calibration: CalibrationOptions
    options: CapOptions
    text: EvalText
    device: torch.device

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration text (sequences, length)."""
        return calibration_tokens(self.source, self.calibration, self.device)

    @cached_property
    def statistics(self) -> DenseStatistics:
        """Curvature of the dense model on the calibration text."""
        half = self.calibration.tokens // 2
        return dense_statistics(
            self.source,
            self.tokens,
            diagonal=False,
            device=self.device,
            gradient_tokens=half,
        )

    @cached_property
    def pools(self) -> Pools:
        """CAP's candidates."""
        return make_pools(self.source, self.options.iterations, self.device)

    def amount(self, keep: float) -> float:
        """Return the parameters that a kept share leaves."""
        return amount_of(self.source, Budget("keep", keep))[0]

    @cached_property
    def mixtures(self) -> dict[MatrixId, Mixtures]:
        """What every matrix may become in our allocation."""
        return offered_mixtures(self.source, self.statistics, self.device)

    def score(self, name: str) -> Score:
        """Return the score of candidates by curvature or by energy."""
        by_curvature = name in (POLICY, AUCTION)
        return curvature_score(PARAMETERS, self.statistics) if by_curvature else energy_score(PARAMETERS)

    def learned(self, method: str, keep: float) -> Learned:
        """Return the outcome of a search."""
        scores, amount = all_scores(self.score(method), self.pools), self.amount(keep)
        first = first_probabilities(self.pools, scores, PARAMETERS, amount)
        return learn(
            self.source,
            self.pools,
            first,
            amount,
            PARAMETERS,
            self.options,
            tokens=self.tokens,
            device=self.device,
        )

    def choice(self, method: str, keep: float) -> Mapping[MatrixId, Parts]:
        """Return what replaces the matrices."""
        if method == WHOLE:
            return {place: pool.parts for place, pool in self.pools.items()}
        amount = self.amount(keep)
        if method.endswith("-refitted"):
            chosen = self.choice(method.removesuffix("-refitted"), keep)
            return refitted_parts(self.source, chosen, self.statistics, self.device)
        if method in SEARCHES:
            return most_probable(self.pools, self.learned(method, keep).probabilities, amount, PARAMETERS)
        if method in SEARCHES.values():
            return largest_scores(self.score(method), self.pools, amount, PARAMETERS)
        if method == "split-each":
            return largest_of_each(self.score(ENERGY), self.pools, amount, PARAMETERS)
        if method == "low-rank-pool":
            return largest_scores(directions_only(self.score(AUCTION)), self.pools, amount, PARAMETERS)
        if method == MIXTURE:
            return mixture_selection(
                self.source, self.mixtures, amount, PARAMETERS, self.statistics, self.device
            )
        if method == SSLC:
            return sslc_parts(
                self.source,
                Budget("keep", keep),
                SslcOptions(keep=keep),
                statistics=self.statistics,
                device=self.device,
            )
        if method == "wanda":
            return wanda(self.source, keep, self.statistics)
        return magnitude(self.source, keep, "global" if method == "magnitude-global" else "matrix")

    def measure(self, method: str, keep: float) -> Row:
        """Return one row of the results."""
        asked = {"method": method, "asked": keep}
        if method == DENSE:
            return asked | self._row(self.source.load())
        if method == "low-rank-svd":
            return asked | self._svd(keep)
        parts = self.choice(method, keep)
        model = self.source.load()
        layers = model.get_submodule(self.source.architecture.layers)
        for (layer, path), item in parts.items():
            layers.get_submodule(f"{layer}.{path}").weight.data.copy_(item.dense())
        losses = {"losses": self.learned(method, keep).losses} if method in SEARCHES else {}
        return asked | self._row(model) | self._facts(parts) | losses

    def _svd(self, keep: float) -> Row:
        factorize = Factorize(SINGLE, form="plain", rank_multiple=1)
        recipe = Recipe((factorize,), self.calibration, Budget("keep", keep))
        rewritten = rewrite_model(self.model, recipe, run=Run(device=str(self.device)))
        shapes, kept = linear_shapes(self.source), 0
        for site in rewritten.plan.sites:
            rows, columns = shapes[site.layer, site.paths[0]]
            kept += rows * columns if site.form == "dense" else site.rank * (rows + columns)
        share = kept / sum(rows * columns for rows, columns in shapes.values())
        return self._row(rewritten.model.float()) | {"kept": share, "bytes": share}

    def _row(self, model: Any) -> Row:
        return {**harness.perplexity(model, self.text, self.model), "kept": 1.0, "bytes": 1.0}

    def _facts(self, parts: Mapping[MatrixId, Parts]) -> Row:
        """Return what a choice keeps, in all and by matrix."""
        numbers = sum(item.shape[0] * item.shape[1] for item in parts.values())
        roles = {
            (layer, item.path): item.role
            for layer in range(self.source.layer_count)
            for item in self.source.architecture.projections(self.source.config, layer)
        }
        allocation: dict[str, list[list[float]]] = {}
        for (layer, path), item in parts.items():
            size = item.shape[0] * item.shape[1]
            shares = [round(item.rank * sum(item.shape) / size, 4), round(item.entries / size, 4)]
            allocation.setdefault(roles[layer, path], []).append(shares)
        return {
            "kept": sum(item.parameters for item in parts.values()) / numbers,
            "bytes": sum(stored_bytes(item) for item in parts.values()) / (HALF.number * numbers),
            "low_rank": sum(item.rank * sum(item.shape) for item in parts.values()) / numbers,
            "over_dense": len(over_dense(parts)),
            "allocation": allocation,
        }


def stored_bytes(parts: Parts) -> float:
    """Return the bytes of factors, dense columns with their places, and entries with one-byte gaps."""
    rows = parts.shape[0]
    split = split_columns(
        parts.shape,
        parts.indices,
        parts.values,
        dense_bytes=HALF.column + 4 / rows,
        sparse_bytes=HALF.entry,
    )
    gaps, _ = encode_gaps(split.indices, split.values)
    columns = len(split.columns) * (rows * HALF.column + 4)
    return HALF.number * parts.rank * sum(parts.shape) + columns + HALF.entry * len(gaps)


def wanted() -> Iterator[tuple[str, str, float]]:
    """Yield key, method and kept share of every row, in the order of the table."""
    yield DENSE, DENSE, 1.0
    yield WHOLE, WHOLE, 1.0
    methods = [name for name in TITLES if name not in (DENSE, WHOLE)]
    blind = (BLIND_POLICY, ENERGY)
    for keep in KEPT:
        for method in methods:
            if method not in blind or keep == ENERGY_KEPT:
                yield f"{method}@{keep}", method, keep
