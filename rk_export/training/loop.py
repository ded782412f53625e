"""Steps of an optimizer over sequences of tokens, resumable: what recovery and basis selection share.

Tensors of very different size are trained together, so each one's step is relative to its own root mean square, as
in Adafactor (1804.04235).
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.model.context import own_context
from rk_export.progress import stage
from rk_export.training.on_disk import OnDisk
from rk_export.training.state import StateFile, TrainingState

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_TOKENS_TOGETHER = 2048  # more than that in one step are accumulated, to bound the memory
SMALLEST_SCALE = 1e-3  # a tensor that starts at zero moves too


class Training(ABC):
    """The loop: between two steps everything that the next ones depend on is in the state.

    Args:
        title: What is trained, for the log.
        where: The option at fault when the loss is not finite.
        tokens: Token ids (sequences, length).
        batch_tokens: Of a step, rounded down to whole sequences, at least one.
        steps: All of them.
        seed: Of the order of the sequences.

    Attributes:
        step: Steps done.
        losses: (step, mean loss of its tokens before it), from 1.
        seconds: Time spent, in earlier runs too.
    """

    def __init__(
        self, title: str, where: str, tokens: Tensor, batch_tokens: int, steps: int, seed: int
    ) -> None:
        self._title, self._where, self._steps, self._seed = title, where, steps, seed
        self._batch = max(1, batch_tokens // tokens.shape[1])
        self._tokens = tokens
        self.step, self.seconds = 0, 0.0
        self._between_steps = True  # what is in memory is the state after `step`
        self.losses: list[tuple[int, float]] = []
        self._on_disk: OnDisk | None = None

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self._batch * self._tokens.shape[1]

    @abstractmethod
    def _trained(self) -> dict[str, Tensor]:
        """Return what is trained, by name."""

    @abstractmethod
    def _backward(self, rows: list[int], share: float) -> float:
        """Add the gradients of some sequences, weighted by their share of the step; return their part of its loss."""

    @abstractmethod
    def _rate(self) -> float:
        """Return the share of each tensor's largest step that the next step takes."""

    def _observe(self) -> None:  # noqa: B027 (not every training looks)
        """Look at the gradients of a step before it is taken."""

    def _stepped(self) -> None:  # noqa: B027 (nor does more than train)
        """Do what is due after a step."""

    def _note(self, tokens_per_second: float) -> str:
        """Return what the progress says of a step beside its loss."""
        return f"{tokens_per_second:.0f} tokens/s"

    def _more_state(self) -> dict[str, Tensor]:
        """Return what the next step depends on beside the trained tensors."""
        return {}

    def _optimize(self, peaks: Mapping[str, float]) -> None:
        """Begin with a fresh optimizer; `peaks` is the largest step of each trained tensor."""
        trained = self._trained()
        if self._on_disk is not None:
            self._on_disk.release()
        self._on_disk = OnDisk(trained)
        groups = [{"params": [tensor], "peak": peaks[name]} for name, tensor in trained.items()]
        self._optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)
        self._on_disk.keep_moments(self._optimizer)

    @torch.no_grad()
    def _restore_trained(self, state: TrainingState) -> None:
        for name, tensor in (self._trained() | self._more_state()).items():
            tensor.copy_(state.tensors[name])

    def _resume(self, state: TrainingState) -> None:
        """Go on from a state whose tensors are in place."""
        self._optimizer.load_state_dict(state.optimizer)
        if self._on_disk is not None:
            self._on_disk.keep_moments(self._optimizer)
        self.step, self.losses, self.seconds = state.step, list(state.losses), state.seconds
        logger.info("%s goes on after step %d of %d", self._title, self.step, self._steps)

    def run(self, file: StateFile) -> None:
        """Take the steps that are left.

        Raises:
            InputError: If the loss is not finite.
        """
        before, done, begin = self.seconds, self.step, time.monotonic()
        try:
            with stage(f"steps of {self._title}", self._steps, done) as bar:
                while self.step < self._steps:
                    loss = self._gradients()
                    self._between_steps = False
                    self._take_step(loss)
                    self._between_steps = True
                    spent = time.monotonic() - begin
                    self.seconds = before + spent
                    speed = self.batch_tokens * (self.step - done) / spent
                    bar.advance(note=f"loss {loss:.4f}, {self._note(speed)}")
                    if file.is_due or self.step == self._steps:
                        file.write(self._state(file.run))
        except (KeyboardInterrupt, SystemExit):
            # Gradients are no part of the state, so only an interrupt inside a step must leave the last one on disk.
            if self._between_steps and self.step > done:
                file.write(self._state(file.run))
            raise
        finally:
            if self._on_disk is not None:
                self._on_disk.release()

    def _gradients(self) -> float:
        """Sum up the gradients of the next step; return the mean loss of its tokens."""
        rows = batch_rows(self.step, self._batch, len(self._tokens), self._seed)
        together = max(1, _TOKENS_TOGETHER // self._tokens.shape[1])
        parts = [rows[begin : begin + together] for begin in range(0, len(rows), together)]
        return sum(self._backward(part, len(part) / len(rows)) for part in parts)

    def _take_step(self, loss: float) -> None:
        """Take one step of the optimizer, and note the loss before it.

        Raises:
            InputError: If the loss is not finite.
        """
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {self.step + 1}",
                where=self._where,
                fix="give a smaller learning rate",
            )
        self._observe()
        torch.nn.utils.clip_grad_norm_(self._trained().values(), _CLIP)
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self.losses.append((self.step, loss))
        self._stepped()

    def _state(self, run: str) -> TrainingState:
        tensors = {name: tensor.detach() for name, tensor in (self._trained() | self._more_state()).items()}
        return TrainingState(
            run, self.step, tuple(self.losses), self.seconds, tensors, self._optimizer.state_dict()
        )


def batch_rows(step: int, batch: int, sequences: int, seed: int) -> list[int]:
    """Return the sequences of a step: each is drawn once before any is drawn again.

    A function of its arguments alone, so that a run which goes on needs no random state.
    """
    rows = []
    for draw in range(step * batch, (step + 1) * batch):
        turn, place = divmod(draw, sequences)
        order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed + turn))
        rows.append(int(order[place]))
    return rows


def root_mean_square(tensor: Tensor) -> float:
    """Return the root mean square of a tensor's values, 0 where it has none."""
    values = tensor.detach().double()
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def check_tokens(config: PretrainedConfig, tokens: Tensor) -> None:
    """Refuse token ids that a model cannot be trained on.

    Raises:
        InputError: Says what a model takes.
    """
    longest, words = own_context(config), config.vocab_size
    if tokens.ndim != 2 or tokens.shape[0] < 1 or not 2 <= tokens.shape[1] <= longest:
        raise InputError(
            f"tokens of shape {tuple(tokens.shape)} cannot be trained on",
            where="tokens",
            fix=f"give (sequences, length) with a length from 2 to {longest}",
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= words:
        raise InputError(
            f"token ids from {int(tokens.min())} to {int(tokens.max())} are outside the vocabulary",
            where="tokens",
            fix=f"give ids from 0 to {words - 1}",
        )
