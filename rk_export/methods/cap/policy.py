"""CAP's policy gradient (2505.03801): keep-probabilities of all candidates, learned from the loss of sampled masks.

Every candidate i is kept with probability s_i. A step draws a mask m, takes the calibration loss ℒ of the model
with W = U diag(m) V + S∘m in every matrix, and moves all probabilities at once by REINFORCE,

    s ← Π[s - η (ℒ - δ) (m - s) / (s (1 - s) + ε)],

δ the mean of the last losses and Π the projection onto {0 <= s <= 1, prices · s <= budget}. Forward passes only.
What the paper leaves open is settled here:

- The first probabilities say what is known already, s = σ((log w - θ) / T) with w what a candidate is worth for
  its price, by the curvature of the loss or by its energy, and θ where the budget is met. From equal
  probabilities, one number a step cannot tell tens of millions of candidates apart.
- The loss counts from that of the first probabilities' own choice on the same tokens, which moves the expectation
  of no gradient. Tokens differ in how hard they are, and in what compression does to them: on SmolLM2 at one half
  the losses of draws differ by 0.06 nats on the same tokens and, counted from the dense model, by 0.4 between
  batches, so that a step would follow the batch.
- ε bounds the step of a candidate that was drawn against the odds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.streams import Streams
from rk_export.calibration.text_run import LOGITS_TOGETHER
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.cap.pools import Pool, Pools, by_place, flat_prices, taken_within
from rk_export.methods.sparse_sites import Prices
from rk_export.passes.numerics.knapsack import logistic_probabilities, project_to_budget
from rk_export.progress import stage
from rk_export.scratch import zeros
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cache_file, read_tensors, write_tensors

# Of the first probabilities, in nats of worth. SmolLM2 at one half: masks drawn at 0.5, 0.15 and 0.05 lose 3.5, 2.9
# and 2.7 nats, as much as the top-K at last; at 0.15 every ninth candidate is in doubt.
TEMPERATURE = 0.15
EPSILON = 0.05
KEEP_EVERY = 20  # steps between two states on disk
CACHE_LIMIT = 2_000_000_000  # bytes; a larger state is not kept
_CHUNK = 1 << 21
_LEAST = 1e-30
_VERSION = 3
_DRAWN = "drawn"
_POLICY_FIELDS = ("steps", "learning_rate", "window", "batch_tokens", "seed")


@dataclass(frozen=True)
class Learned:
    """Outcome of the policy gradient.

    Args:
        probabilities: s of all candidates (candidates,), float32, in the pools' order.
        losses: Loss of the sampled model at every step, beyond that of the choice that the search starts from on the
            same tokens, nats per token.
    """

    probabilities: Tensor
    losses: tuple[float, ...]


def first_probabilities(pools: Pools, scores: Tensor, prices: Prices, budget: float) -> Tensor:
    """Return the probabilities that the search starts from (candidates,), float32, on disk; they cost the budget.

    Args:
        pools: The candidates.
        scores: What each is worth for its price (candidates,).
        prices: Of the candidates.
        budget: In their unit.
    """
    logarithms = zeros(scores.shape, scores.dtype, scores.device)
    torch.clamp(scores, min=_LEAST, out=logarithms).log_()
    return logistic_probabilities(logarithms, flat_prices(pools, prices), budget, TEMPERATURE, out=logarithms)


def learn(
    source: Source,
    pools: Pools,
    first: Tensor,
    budget: float,
    prices: Prices,
    options: CapOptions,
    *,
    tokens: Tensor,
    device: torch.device,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Learned:
    """Learn the keep-probabilities; an interrupted search goes on from its last state on disk.

    Args:
        source: The dense model.
        pools: Its candidates.
        first: The probabilities to start from (candidates,).
        budget: What those kept may cost, in the unit of `prices`.
        prices: Of the candidates.
        options: Steps, learning rate, window, tokens of a step, seed.
        tokens: Calibration text, int64 (sequences, length), without padding; steps take turns through it.
        device: Where the model runs.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.
    """
    key = {
        "model": source.fingerprint(cache_dir),
        "start": _digest(pools, first, tokens),
        "budget": budget,
        "prices": asdict(prices),
        "policy": {name: getattr(options, name) for name in _POLICY_FIELDS},
        "settled": [EPSILON, _VERSION],
        "tokens": list(tokens.shape),
        "runs": [device.type, str(matmul_dtype(device))],
    }
    path = cache_file("cap-policy", key, cache_dir)
    known = read_tensors(path)
    state = Learned(first, ())
    if known is not None:
        state = Learned(known["probabilities"], tuple(known["losses"].tolist()))
    if len(state.losses) >= options.steps:
        return state
    search = _Search(source, pools, budget, prices, options, tokens, device)
    return search.run(first, state, path)


def _digest(pools: Pools, first: Tensor, tokens: Tensor) -> str:
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy().data)
    digest.update(first.numpy().data)
    for place, pool in pools.items():
        digest.update(f"{place} {pool.parts.shape} {pool.parts.rank} {pool.parts.entries}".encode())
        digest.update(pool.parts.values.numpy().data)
    return digest.hexdigest()


class _Search:
    """A model whose matrices are drawn anew at every step; those of one layer exist at a time."""

    def __init__(
        self,
        source: Source,
        pools: Pools,
        budget: float,
        prices: Prices,
        options: CapOptions,
        tokens: Tensor,
        device: torch.device,
    ) -> None:
        self._layers_path = source.architecture.layers
        self._model = _without_matrices(source, pools, device)
        self._pools = {place: on_device(pool, device) for place, pool in pools.items()}
        self._prices = flat_prices(self._pools, prices)
        self._budget, self._options, self._device = budget, options, device
        sequences = max(1, options.batch_tokens // tokens.shape[1])
        whole = [batch for batch in torch.split(tokens, sequences) if len(batch) == sequences]
        self._batches = [batch.to(device) for batch in whole[: options.steps] or [tokens]]

    @torch.no_grad()
    def run(self, first: Tensor, state: Learned, path: Path) -> Learned:
        """Take the steps that are missing."""
        start = self._losses(taken_within(first.to(self._device), self._prices, self._budget), self._batches)
        s, losses = zeros(first.shape, first.dtype, self._device), list(state.losses)
        s.copy_(state.probabilities)
        mask = zeros(first.shape, torch.bool, self._device)
        steps, window = self._options.steps, self._options.window
        with stage("policy steps", steps, done=len(losses)) as bar:
            for step in range(len(losses), steps):
                turn = step % len(self._batches)
                self._draw(s, step, mask)
                (drawn,) = self._losses(mask, self._batches[turn : turn + 1])
                loss = drawn - start[turn]
                advantage = loss - sum(losses[-window:]) / len(losses[-window:]) if losses else 0.0
                losses.append(loss)
                reinforce(s, mask, self._options.learning_rate * advantage)
                s, multiplier = project_to_budget(s, self._prices, self._budget, s)
                bar.advance(note=f"loss {loss:+.4f}, advantage {advantage:+.4f}, λ {multiplier:.1e}")
                if (step + 1) % KEEP_EVERY == 0 or step + 1 == steps:
                    _keep(path, s, losses)
        return Learned(s.cpu(), tuple(losses))

    def _draw(self, s: Tensor, step: int, mask: Tensor) -> None:
        """Draw a mask (candidates,)."""
        generator = torch.Generator(self._device).manual_seed(self._options.seed * 1_000_003 + step)
        for part, probabilities in zip(torch.split(mask, _CHUNK), torch.split(s, _CHUNK), strict=True):
            uniform = torch.rand(len(part), generator=generator, device=self._device)
            torch.lt(uniform, probabilities, out=part)

    def _losses(self, mask: Tensor, batches: Sequence[Tensor]) -> list[float]:
        """Return the loss of each batch under the candidates that a mask (candidates,) leaves."""
        layers = self._model.get_submodule(self._layers_path)
        masks = by_place(self._pools, mask)

        def fill(index: int) -> None:
            for place, here in masks.items():
                if place.layer == index:
                    linear = layers.get_submodule(f"{index}.{place.path}")
                    set_weight(linear, self._pools[place], here)

        return next_token_losses(self._model, layers, fill, batches)


def _without_matrices(source: Source, pools: Pools, device: torch.device) -> PreTrainedModel:
    """Return the dense model with one set of matrices, whose values are left open, for all layers."""
    model = source.load().requires_grad_(False)
    layers = model.get_submodule(source.architecture.layers)
    linears = {place: layers.get_submodule(f"{place.layer}.{place.path}") for place in pools}
    for linear in linears.values():
        linear.weight = None
    model.to(device)
    shared: dict[tuple[str, tuple[int, int]], nn.Parameter] = {}
    for place, linear in linears.items():
        shape = pools[place].parts.shape
        if (place.path, shape) not in shared:
            shared[place.path, shape] = nn.Parameter(torch.empty(shape, device=device), requires_grad=False)
        linear.weight = shared[place.path, shape]
    return model


def set_weight(linear: nn.Module, pool: Pool, mask: Tensor) -> None:
    """Set a linear module's weight to U diag(m) V + S∘m, in place.

    Args:
        linear: Weight (out, in).
        pool: The candidates of that matrix, on its device.
        mask: bool (candidates,).
    """
    parts, weight = pool.parts, linear.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(linear).__name__} has no weight")
    directions = mask[: parts.rank]
    torch.mm(parts.up[:, directions], parts.down[directions], out=weight.data)
    weight.data.view(-1).index_add_(0, parts.indices, parts.values * mask[parts.rank :])


def on_device(pool: Pool, device: torch.device) -> Pool:
    """Return a pool with its tensors on a device."""
    parts = pool.parts
    if parts.values.device == device:
        return pool
    moved = (item.to(device) for item in (parts.up, parts.down, parts.indices, parts.values))
    return Pool(type(parts)(*moved), pool.residual)


def reinforce(s: Tensor, mask: Tensor, rate: float) -> None:
    """Move probabilities (candidates,) by -rate (m - s) / (s (1 - s) + ε), in place.

    Args:
        s: The probabilities; they may leave [0, 1], until they are projected.
        mask: What was drawn, bool (candidates,).
        rate: Learning rate times advantage.
    """
    if rate:
        for part, drawn in zip(torch.split(s, _CHUNK), torch.split(mask, _CHUNK), strict=True):
            spread = (part * (1 - part)).add_(EPSILON)
            part.sub_(drawn.to(part.dtype).sub_(part).div_(spread), alpha=rate)


def next_token_losses(
    model: PreTrainedModel, layers: nn.Module, fill: Callable[[int], None], batches: Sequence[Tensor]
) -> list[float]:
    """Return the mean cross entropy of the next tokens of each batch, in nats.

    Args:
        model: The model; what is outside its layers is filled.
        layers: Those of the model.
        fill: Fills the layer of a number, just before all batches pass it.
        batches: Token ids (sequences, length) each.
    """
    if not isinstance(layers, nn.ModuleList):
        raise TypeError("the layers are no list")
    runs = [Streams(model, layers, ids) for ids in batches]
    for run in runs:
        with _matmuls(run.input_ids.device):
            run.start(_DRAWN)
    for index in range(len(layers)):
        fill(index)
        for run in runs:
            with _matmuls(run.input_ids.device):
                run.advance(_DRAWN, index)
    return [_next_token_loss(run, int(model.config.vocab_size)) for run in runs]


def _next_token_loss(run: Streams, vocabulary: int) -> float:
    states = run.hidden[_DRAWN][:, :-1].flatten(0, 1)
    targets = run.input_ids[:, 1:].flatten()
    together, total = max(1, LOGITS_TOGETHER // vocabulary), 0.0
    for rows, wanted in zip(torch.split(states, together), torch.split(targets, together), strict=True):
        with _matmuls(rows.device):
            logits = run.output(rows[:, None])[:, 0]
        total += float(nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
    return total / len(targets)


def _matmuls(device: torch.device) -> AbstractContextManager[object]:
    return matmuls_in(matmul_dtype(device), device)


def _keep(path: Path, s: Tensor, losses: list[float]) -> None:
    if s.nbytes <= CACHE_LIMIT:
        write_tensors(path, {"probabilities": s, "losses": torch.tensor(losses, dtype=torch.float64)})
