"""Which exact reparameterizations lower the predicted loss of a model in the formats that it is to have.

A short text runs through the dense model once. Each layer is then reparameterized in every way that it takes, and what
rounding its matrices and their inputs would cost is predicted from what they read there. Costs of matrices add up, so
that each family of matrices is decided on its own.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rk_export.calibration.moments import MomentSum, readers, recorded_inputs
from rk_export.calibration.neuron_peaks import shortened
from rk_export.calibration.sensitivity import output_weights
from rk_export.calibration.streams import Streams
from rk_export.device import lent, matmul_dtype, matmuls_in
from rk_export.matrix_id import MatrixId
from rk_export.memory import give_back
from rk_export.model.architecture import Projection
from rk_export.model.layer_wiring import wiring_of
from rk_export.model.preparable import preparations_of
from rk_export.options.prepare import PARTS_OF_FOLD, PREPARATIONS
from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.predicted_loss import block_peaks, input_rounding_loss, rounding_loss
from rk_export.passes.prepare.parameters import read, weight
from rk_export.passes.prepare.scale import neuron_scales
from rk_export.passes.prepare.wiring import Wiring
from rk_export.progress import track
from rk_export.report.records import Finding, Outcome
from rk_export.source.prepared import LayerPreparation
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cached, text_key

logger = logging.getLogger(__name__)

DENSE = "dense"
CHUNK = 2048  # tokens of the short text, which run together
# A family is reparameterized where that lowers the loss of the whole by this share: predictions are not exact.
WORTH_IT = 0.01
_VERSION = 2  # raise when other predictions come out: cached ones of an older version are then made again
_FOLDED = {
    "q": "fold-attention",
    "k": "fold-attention",
    "v": "fold-attention",
    "conv_in": "fold-attention",
    "gate": "fold-mlp",
    "up": "fold-mlp",
}

State = frozenset[str]  # the preparations that touch a matrix
Costs = Mapping[tuple[str, State], float]  # predicted loss by role and state


@dataclass(frozen=True)
class Rounding:
    """What rounding is predicted for.

    Args:
        spec: Format of the matrices.
        compensated: Later columns make up for the error of earlier ones (GPTQ).
        int8_inputs: Weight-only products round their inputs to int8, block by block (accuracy level 4).
    """

    spec: QuantSpec
    compensated: bool
    int8_inputs: bool


@dataclass(frozen=True)
class PreparationChoice:
    """What was decided.

    Args:
        names: The preparations to take.
        findings: What each would have cost.
    """

    names: tuple[str, ...]
    findings: tuple[Finding, ...]


def choose_preparations(
    source: Source,
    tokens: Tensor,
    rounding: Rounding,
    preparation: LayerPreparation,
    device: torch.device,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    folder: Path | None = None,
) -> PreparationChoice:
    """Decide which reparameterizations a model takes, or read what an earlier run predicted.

    Args:
        source: The dense model, as it is.
        tokens: Calibration text, int64 (sequences, length); a short part is read.
        rounding: The formats to predict for.
        preparation: Every preparation that may be taken, with its rotations and peaks.
        device: Where the text runs.
        cache_dir: Where predictions are kept; ``~/.cache/rk-export`` when None.
        folder: As in `dense_statistics`.

    Returns:
        The preparations in their order, empty where none lowers the loss.
    """
    possible = preparations_of(source.description, preparation.names).names
    if not possible:
        return PreparationChoice((), ())
    tokens, preparation = shortened(tokens, CHUNK), replace(preparation, names=possible)
    key = {
        "version": _VERSION,
        "model": source.fingerprint(cache_dir),
        **text_key(tokens),
        "rounding": asdict(rounding),
        "preparation": preparation.variant,
        "runs": [device.type, str(matmul_dtype(device))],
    }
    combinations = tuple(_combinations(possible))

    def make() -> dict[str, Tensor]:
        weights = _output_weights(source, tokens, device, cache_dir, folder)
        costs = _costs(source, tokens, rounding, preparation, weights, device)
        losses = [_total(costs, names) for names in combinations]
        return {"losses": torch.tensor(losses, dtype=torch.float64)}

    losses = cached("preparations", key, make, cache_dir)["losses"].tolist()
    totals = dict(zip(combinations, losses, strict=True))
    best = min(totals, key=totals.__getitem__)
    if totals[best] > (1 - WORTH_IT) * totals[()]:
        best = ()
    for names, total in sorted(totals.items(), key=lambda item: item[1]):
        logger.debug("prepare %s: predicted loss %.4g", ",".join(names) or "none", total)
    return PreparationChoice(best, tuple(_findings(totals, best)))


def _combinations(possible: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield every set of preparations that go together, in their order; a rotation needs every norm folded."""
    single = [name for name in PARTS_OF_FOLD if "fold" in possible]
    single += [name for name in ("rotate-heads", "scale") if name in possible]
    for count in range(len(single) + 1):
        yield from itertools.combinations(single, count)
    if "rotate" in possible:
        others = [name for name in single if not name.startswith("fold")]
        for count in range(len(others) + 1):
            yield from (("fold", "rotate", *rest) for rest in itertools.combinations(others, count))


def _state(role: str, names: tuple[str, ...]) -> State:
    """Return which of the preparations touch a matrix of a role."""
    touching = {_FOLDED.get(role, ""), "rotate"}
    touching |= {"rotate-heads"} if role in ("v", "o") else {"scale"} if role in ("up", "down") else set()
    given = {*names, *PARTS_OF_FOLD} if "fold" in names else set(names)
    return frozenset(touching & given)


def _total(costs: Costs, names: tuple[str, ...]) -> float:
    roles = {role for role, _ in costs}
    return sum(costs[role, _state(role, names)] for role in roles)


def _findings(totals: Mapping[tuple[str, ...], float], best: tuple[str, ...]) -> Iterator[Finding]:
    """Yield one finding a preparation: the predicted loss of the best choice with it and of the best without."""
    single = {name for names in totals for name in names} - {"fold"}
    for name in sorted(single, key=(*PARTS_OF_FOLD, *PREPARATIONS).index):
        with_it = min(total for names, total in totals.items() if _takes(names, name))
        without = min(total for names, total in totals.items() if not _takes(names, name))
        taken = _takes(best, name)
        reason = f"predicted loss {with_it:.3g} nats a token with it, {without:.3g} without"
        details = {"pass": "prepare", "predicted_loss": {"with": with_it, "without": without}}
        yield Finding(
            f"prepare.{name}", Outcome.APPLIED if taken else Outcome.SKIPPED, reason, details=details
        )


def _takes(names: tuple[str, ...], name: str) -> bool:
    return name in names or (name in PARTS_OF_FOLD and "fold" in names)


def _output_weights(
    source: Source,
    tokens: Tensor,
    device: torch.device,
    cache_dir: str | os.PathLike[str] | None,
    folder: Path | None,
) -> dict[MatrixId, Tensor]:
    """Return what the errors of every output weigh; the formats do not matter, so another recipe finds it on disk."""
    key = {
        "version": _VERSION,
        "model": source.fingerprint(cache_dir),
        **text_key(tokens),
        "runs": [device.type, str(matmul_dtype(device))],
    }

    def make() -> dict[str, Tensor]:
        found = output_weights(source, tokens, device, folder)
        return {place.name: weight.cpu() for place, weight in found.items()}

    known = cached("output-weights", key, make, cache_dir)
    places = [matrix.id for matrix in source.description.matrices]
    return {place: known[place.name].to(device) for place in places if place.name in known}


def _costs(
    source: Source,
    tokens: Tensor,
    rounding: Rounding,
    preparation: LayerPreparation,
    weights: Mapping[MatrixId, Tensor],
    device: torch.device,
) -> Costs:
    """Predict the loss of every role under every state, summed over layers."""
    model = source.shared()
    layers = model.get_submodule(source.architecture.layers)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{source.architecture.layers} is no list of layers")
    streams = Streams(model, layers, tokens)
    streams.start(DENSE)
    costs: defaultdict[tuple[str, State], float] = defaultdict(float)
    for index, layer in enumerate(track(layers, "predicting what reparameterizations save, layers")):
        projections = source.description.projections(index)
        modules = {item.path: layer.get_submodule(item.path) for item in projections}
        with lent(layer, device):
            with recorded_inputs(modules) as seen, matmuls_in(matmul_dtype(device), device):
                streams.advance(DENSE, index)
            trial = _Trial(index, layer, wiring_of(source.description, index), preparation, rounding, seen)
            reached = [item for item in projections if item.path in seen and (index, item.path) in weights]
            for key, cost in trial.costs({item.path: _role(item) for item in reached}, weights):
                costs[key] += cost
        give_back()
    return costs


def _role(item: Projection) -> str:
    """Return the role of a matrix in an MLP, experts' too."""
    return item.path.rpartition(".")[2].removesuffix("_proj") if item.role == "expert" else item.role


class _Trial:
    """One layer under every state: what its matrices become, what they read, and what rounding costs there.

    Args:
        index: Of the layer.
        layer: The dense layer, which stays as it is.
        wiring: What its norms feed.
        preparation: The preparations to try.
        rounding: The formats.
        seen: What each matrix reads in the dense layer (..., in), by path.
    """

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        wiring: Wiring,
        preparation: LayerPreparation,
        rounding: Rounding,
        seen: Mapping[str, Tensor],
    ) -> None:
        self._index, self._layer, self._wiring = index, layer, wiring
        self._preparation, self._rounding = preparation, rounding
        self._seen, self._reader = seen, readers(seen)
        self._known: dict[tuple[str, State], tuple[Inputs, Tensor]] = {}

    def costs(
        self, roles: Mapping[str, str], weights: Mapping[MatrixId, Tensor]
    ) -> Iterator[tuple[tuple[str, State], float]]:
        """Yield the predicted loss of every matrix in every state, by role and state.

        Args:
            roles: Role of each matrix by path.
            weights: Mean square of the loss' gradient by the outputs of each matrix (out,).
        """
        done: set[tuple[str, State]] = set()
        for names in _combinations(self._preparation.names):
            new = [(path, _state(role, names)) for path, role in roles.items()]
            if new := [item for item in new if item not in done]:
                layer = copy.deepcopy(
                    self._layer
                )  # one beside the dense layer, whatever the number of states
                self._preparation.apply(layer, self._wiring, self._index, names)
            for path, state in new:
                W = weight(layer.get_submodule(path))
                yield (
                    (roles[path], state),
                    self._cost(path, state, W, weights[MatrixId(self._index, path)].to(W.device)),
                )
            done.update(new)

    def _cost(self, path: str, state: State, W: Tensor, weights: Tensor) -> float:
        spec = self._rounding.spec
        inputs, peaks = self._inputs(path, state)
        outputs = self._output_weights(path, state, weights)
        compensated = self._rounding.compensated and spec.activations == 16
        columns = inputs.column_weights(compensated=compensated)
        loss = rounding_loss(W, spec, Curvature(inputs, {path: outputs}), columns)
        if self._rounding.int8_inputs and spec.activations == 16:
            loss += input_rounding_loss(W, spec.block_size, peaks, outputs)
        return loss

    def _inputs(self, path: str, state: State) -> tuple[Inputs, Tensor]:
        """Return what a matrix reads in a state: its second moment, and the mean squared peak of each block."""
        if path == self._wiring.output:
            state &= {"rotate-heads"}
        elif self._norm_of(path) is None:
            state &= {"scale"}
        else:
            state -= {"rotate-heads", "scale"}
        key = (self._reader[path], state)
        if key not in self._known:
            y = self._read(path, state, self._seen[path].flatten(0, -2).float())
            peak = float(y.abs().amax(1).square().mean())
            moment = MomentSum()
            moment.add(y)
            inputs = Inputs(moment.mean().to(y.device), token_peak=peak)
            self._known[key] = inputs, block_peaks(y, self._rounding.spec.block_size)
        return self._known[key]

    def _norm_of(self, path: str) -> str | None:
        return next((norm for norm, paths in self._wiring.norms.items() if path in paths), None)

    def _read(self, path: str, state: State, x: Tensor) -> Tensor:
        """Return what a matrix reads in a state, given what it reads in the dense layer (tokens, in)."""
        wiring, preparation = self._wiring, self._preparation
        norm = self._norm_of(path)
        if norm is not None and any(name.startswith("fold") for name in state):
            module = self._layer.get_submodule(norm)
            gain, shift = weight(module) + float(wiring.unit_offset), read(module, "bias")
            x = x if shift is None else x - shift.to(x)
            x = torch.where(gain.to(x) == 0, torch.zeros_like(x), x / gain.to(x))
        if norm is not None and "rotate" in state:
            x = preparation.rotation.right(x)
        if path == wiring.output and "rotate-heads" in state:
            x = _rotated_heads(x, preparation, self._index, wiring.kv_heads)
        if "scale" in state and any(path == down for _, down in wiring.mlps):
            x = x / neuron_scales(preparation.peaks_of(self._index, path), preparation.alpha).to(x)
        return x

    def _output_weights(self, path: str, state: State, weights: Tensor) -> Tensor:
        """Return the weights of the outputs in a state; a rotation spreads them evenly, up to its randomness."""
        if path in self._wiring.writers and "rotate" in state:
            return weights.mean().expand_as(weights)
        if path == self._wiring.value and "rotate-heads" in state:
            by_head = weights.view(self._wiring.kv_heads, -1)
            return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()
        if "scale" in state and (down := dict(self._wiring.mlps).get(path)) is not None:
            scales = neuron_scales(self._preparation.peaks_of(self._index, down), self._preparation.alpha)
            return weights * scales.to(weights).square()
        return weights


def _rotated_heads(x: Tensor, preparation: LayerPreparation, index: int, kv_heads: int) -> Tensor:
    """Return what the output projection reads once the values are rotated inside their heads."""
    rotations = preparation.head_rotations(index, kv_heads)
    size = len(rotations[0].signs)
    parts = zip(rotations, x.chunk(kv_heads, dim=1), strict=True)
    return torch.cat(
        [rotation.right(part.reshape(-1, size)).reshape(len(x), -1) for rotation, part in parts], dim=1
    )
