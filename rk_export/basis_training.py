"""The training of basis selection: coefficients and new bases on the task's text, directions dropped on the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.basis_dropping import Dropping
from rk_export.basis_modules import BasisLinear, root_mean_square
from rk_export.distillation import Head, last_hidden
from rk_export.errors import InputError
from rk_export.heal import batch_rows
from rk_export.heal_state import StateFile, TrainingState
from rk_export.method_options import BaselOptions
from rk_export.next_token import backward_next_token
from rk_export.options import RankRule
from rk_export.passes.numerics.basis import DROPPING, second_order
from rk_export.precision import matmuls_in

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_WARMUP = 0.05  # share of a phase in which the rate rises
_TOKENS_TOGETHER = 2048  # more than that in one step are accumulated, to bound the memory
_SMALLEST_SCALE = 1e-3  # a tensor that starts at zero moves too
_HELD = "held"


class BasisTraining:
    """The loop: between two steps everything that the next ones depend on is in the state.

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
        self._model, self._modules, self._others = model, dict(modules), dict(others)
        self._head, self._options, self._dtype = head, options, dtype
        self._batch = max(1, options.batch_tokens // tokens.shape[1])
        self._tokens = tokens
        sizes = [module.size for module in self._modules.values()]
        counts = [len(module.coefficients) for module in self._modules.values()]
        self._dense = sum(size.dense for size in sizes)
        self._dropping = Dropping(rank, options.steps, options.events, sizes, counts)
        self._optimizer = self._new_optimizer()
        self.step, self.seconds = 0, 0.0
        self.losses: list[tuple[int, float]] = []

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self._batch * self._tokens.shape[1]

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
        with torch.no_grad():
            for name, tensor in (self._trained() | self._evidence()).items():
                tensor.copy_(state.tensors[name])
        self._dropping.held = state.tensors[_HELD].tolist()
        self._optimizer = self._new_optimizer()
        self._optimizer.load_state_dict(state.optimizer)
        self.step, self.losses, self.seconds = state.step, list(state.losses), state.seconds
        logger.info("basis selection goes on after step %d", self.step)

    def run(self, file: StateFile) -> None:
        """Take the steps that are left.

        Raises:
            InputError: If the loss is not finite.
        """
        total, before = self._options.steps + self._options.tune, self.seconds
        begin = time.monotonic()
        while self.step < total:
            start = time.monotonic()
            loss = self._take_step()
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} at step {self.step + 1}",
                    where="basel",
                    fix="give a smaller learning rate",
                )
            self.step += 1
            self.losses.append((self.step, loss))
            if self._dropping.is_due(self.step):
                self._drop()
            if self.step == self._options.steps and self._options.tune:
                self._thaw()
            now = time.monotonic()
            self.seconds = before + now - begin
            self._log(loss, total, now - start)
            if file.is_due or self.step == total:
                file.write(self._state(file.run))

    def _log(self, loss: float, total: int, seconds: float) -> None:
        """Log where the training stands; steps get cheaper, so the time that is left is an upper bound."""
        minutes, rest = divmod(round(seconds * (total - self.step)), 60)
        logger.info(
            "basis selection: step %d of %d, loss %.4f, pairs hold %.3f of the linear layers, %d:%02d left",
            *(self.step, total, loss, self.share, minutes, rest),
        )

    def _take_step(self) -> float:
        """Take one optimizer step; return the mean loss of its tokens before it."""
        rows = batch_rows(self.step, self._batch, len(self._tokens), self._options.seed)
        together = max(1, _TOKENS_TOGETHER // self._tokens.shape[1])
        parts = [rows[begin : begin + together] for begin in range(0, len(rows), together)]
        loss = sum(self._backward(part, len(part) / len(rows)) for part in parts)
        for module in self._modules.values():
            module.observe()
        torch.nn.utils.clip_grad_norm_(self._trained().values(), _CLIP)
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _backward(self, rows: list[int], share: float) -> float:
        """Add the gradients of some sequences, weighted by their share of the step; return their part of its loss."""
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

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Return an optimizer of what is trained now; each tensor has a rate of its own, see `_peak`."""
        return torch.optim.AdamW(
            [
                {"params": [tensor], "peak": self._peak(name, tensor)}
                for name, tensor in self._trained().items()
            ],
            betas=_BETAS,
            weight_decay=0.0,
            fused=True,
        )

    def _peak(self, name: str, tensor: Tensor) -> float:
        """Return the largest step of a tensor: relative to its root mean square, as in recovery.

        U_add starts at zero and moves relative to its matrix: rows of V_add have a square of 1/r in the mean, so a
        step changes the matrix by the learning rate times its root mean square.
        """
        owner, _, leaf = name.rpartition(".")
        scale = self._modules[owner].scale if leaf == "left_add" else root_mean_square(tensor)
        return self._options.learning_rate * max(scale, _SMALLEST_SCALE)

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
        self._optimizer = self._new_optimizer()

    def _trained(self) -> dict[str, Tensor]:
        inside = {
            f"{name}.{leaf}": tensor
            for name, module in self._modules.items()
            for leaf, tensor in module.trained().items()
        }
        return inside | self._others

    def _evidence(self) -> dict[str, Tensor]:
        return {
            f"{name}.{leaf}": getattr(module, leaf)
            for name, module in self._modules.items()
            for leaf in ("first", "second", "absolute")
        }

    def _state(self, run: str) -> TrainingState:
        places = {f"{name}.kept": module.kept for name, module in self._modules.items()}
        held = {_HELD: torch.tensor(self._dropping.held, dtype=torch.float64)}
        tensors = {name: tensor.detach() for name, tensor in (self._trained() | self._evidence()).items()}
        return TrainingState(
            run,
            self.step,
            tuple(self.losses),
            self.seconds,
            tensors | places | held,
            self._optimizer.state_dict(),
        )


def _shaped(step: int, steps: int, falls_from: float) -> float:
    """Return the rate at a step from 0 to steps - 1: a warm-up, 1, and a half cosine from a share of the steps on."""
    rising, falling = _WARMUP * steps, falls_from * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    if step < falling:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - falling) / (steps - falling))
