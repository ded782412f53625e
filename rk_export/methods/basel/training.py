"""The training of basis selection: coefficients and new bases on the task's text, directions dropped on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.device import matmuls_in
from rk_export.methods.basel.dropping import Dropping
from rk_export.methods.basel.modules import BasisLinear
from rk_export.methods.basel.options import BaselOptions
from rk_export.options.ranks import RankRule
from rk_export.passes.numerics.basis import DROPPING, second_order
from rk_export.training.distillation import Head, last_hidden
from rk_export.training.loop import SMALLEST_SCALE, Training, root_mean_square
from rk_export.training.next_token import backward_next_token
from rk_export.training.state import TrainingState

_WARMUP = 0.05  # share of a phase in which the rate rises
_HELD = "held"


class BasisTraining(Training):
    """The training of the coefficients and new bases of a model, and the dropping of its directions.

    Args:
        model: The model with `BasisLinear` modules, on its device.
        modules: Those modules by name.
        others: What else is trained, by name: norms.
        head: Its output projection.
        tokens: Token ids (sequences, length).
        rank: What is kept at the end: a share of the parameters, or of the importance (`energy`).
        options: How to train.
        dtype: Of the matrix products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[str, BasisLinear],
        others: Mapping[str, Tensor],
        head: Head,
        tokens: Tensor,
        rank: RankRule,
        options: BaselOptions,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(
            "basis selection",
            "basel",
            tokens,
            options.batch_tokens,
            options.steps + options.tune,
            options.seed,
        )
        self._model, self._modules, self._others = model, dict(modules), dict(others)
        self._head, self._options, self._dtype = head, options, dtype
        sizes = [module.size for module in self._modules.values()]
        counts = [len(module.coefficients) for module in self._modules.values()]
        self._dense = sum(size.dense for size in sizes)
        self._dropping = Dropping(rank, options.steps, options.events, sizes, counts)
        self._begin()

    @property
    def share(self) -> float:
        """Parameters of all factor pairs as they are now, over those of the dense matrices."""
        pairs = (module.size.pair(len(module.coefficients)) for module in self._modules.values())
        return sum(pairs) / self._dense

    def restore(self, state: TrainingState | None) -> None:
        """Go on from a state; None is the beginning."""
        if state is None:
            return
        for name, module in self._modules.items():
            module.keep(state.tensors[f"{name}.kept"].to(module.kept.device))
        if self._options.tune and state.step >= self._options.steps:
            self._thaw()
        self._restore_trained(state)
        self._dropping.held = state.tensors[_HELD].tolist()
        self._begin()
        self._resume(state)

    def _observe(self) -> None:
        for module in self._modules.values():
            module.observe()

    def _stepped(self) -> None:
        if self._dropping.is_due(self.step):
            self._drop()
        if self.step == self._options.steps and self._options.tune:
            self._thaw()

    def _note(self, tokens_per_second: float) -> str:
        return f"pairs hold {self.share:.3f} of the linear layers"

    def _backward(self, rows: list[int], share: float) -> float:
        device = self._model.device
        ids = self._tokens[rows].to(device)
        with matmuls_in(self._dtype, device):
            hidden = last_hidden(self._model, ids)
        return share * backward_next_token(hidden, self._head, ids, share=share)

    def _rate(self) -> float:
        """Return the share of the learning rate: it rises, stays while directions are dropped, and falls.

        In the second phase it rises and falls again.
        """
        steps = self._options.steps
        if self.step < steps:
            return _shaped(self.step, steps, DROPPING)
        return _shaped(self.step - steps, self._options.tune, _WARMUP)

    def _begin(self) -> None:
        """Begin with a fresh optimizer of what is trained now; each tensor has a rate of its own, see `_peak`."""
        self._optimize({name: self._peak(name, tensor) for name, tensor in self._trained().items()})

    def _peak(self, name: str, tensor: Tensor) -> float:
        """Return the largest step of a tensor: relative to its root mean square, as in recovery.

        U_add starts at zero and moves relative to its matrix: rows of V_add have a square of 1/r in the mean, so a
        step changes the matrix by the learning rate times its root mean square.
        """
        owner, _, leaf = name.rpartition(".")
        scale = self._modules[owner].scale if leaf == "left_add" else root_mean_square(tensor)
        return self._options.learning_rate * max(scale, SMALLEST_SCALE)

    @torch.no_grad()
    def _drop(self) -> None:
        """Drop the directions that are due."""
        modules = list(self._modules.values())
        choices = self._dropping.chosen(self.step, [self._importance(module) for module in modules])
        for module, index in zip(modules, choices, strict=True):
            self._shrink(module, index)

    def _importance(self, module: BasisLinear) -> Tensor:
        """Return the importance of each direction (k,), float64."""
        if self._options.importance == "magnitude":
            magnitude: Tensor = module.coefficients.detach().double().square()
            return magnitude
        if self._options.importance == "gradient":
            return module.absolute.double()
        return second_order(module.first, module.second, self.step, self.batch_tokens)

    def _shrink(self, module: BasisLinear, index: Tensor) -> None:
        """Drop all directions of a matrix but some, in the optimizer too."""
        if len(index) == len(module.coefficients):
            return
        moments = self._optimizer.state[module.coefficients]
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = moments[key][index]
        module.keep(index)

    def _thaw(self) -> None:
        """Begin the second phase: ranks stay, and the directions are trained too."""
        for module in self._modules.values():
            module.thaw()
        self._begin()

    def _trained(self) -> dict[str, Tensor]:
        inside = {
            f"{name}.{leaf}": tensor
            for name, module in self._modules.items()
            for leaf, tensor in module.trained().items()
        }
        return inside | self._others

    def _more_state(self) -> dict[str, Tensor]:
        """Return the evidence of every direction, and which are left."""
        evidence = {
            f"{name}.{leaf}": getattr(module, leaf)
            for name, module in self._modules.items()
            for leaf in ("first", "second", "absolute", "kept")
        }
        return evidence | {_HELD: torch.tensor(self._dropping.held, dtype=torch.float64)}


def _shaped(step: int, steps: int, falls_from: float) -> float:
    """Return the rate at a step from 0 to steps - 1: a warm-up, 1, and a half cosine from a share of the steps on."""
    rising, falling = _WARMUP * steps, falls_from * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    if step < falling:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - falling) / (steps - falling))
