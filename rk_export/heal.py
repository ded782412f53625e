"""Recovery: a short distillation of a compressed model against the dense one, in place and resumable.

The dense model's next-token distribution on given tokens is the target (forward Kullback-Leibler divergence,
1503.02531); factors, norms, biases and quantization scales are trained, codes and dense matrices stay. Tensors
of very different size are trained together, so each one's step is relative to its own root mean square, as in
Adafactor (1804.04235).
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rk_export.device import resolve_device
from rk_export.distillation import Head, backward_divergence, dense_head, dense_states, last_hidden
from rk_export.errors import InputError
from rk_export.heal_state import StateFile, TrainingState, fingerprint
from rk_export.load import ModelSource
from rk_export.precision import matmul_dtype, matmuls_in
from rk_export.report import Finding, Outcome
from rk_export.rewrite import Rewritten
from rk_export.shared_products import shared_products
from rk_export.trainable import TRAINABLE, trainable

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_SMALLEST_RMS = 1e-3  # a tensor that starts at zero moves too
_TOKENS_TOGETHER = 2048  # more than that in one step are accumulated, to bound the memory


@dataclass(frozen=True)
class HealOptions:
    """How a recovery trains; validated on construction.

    Args:
        steps: Optimizer steps.
        batch_tokens: Tokens per step, rounded down to whole sequences, at least one.
        learning_rate: Largest step of a tensor, relative to its root mean square.
        warmup: Share of the steps in which the rate rises to its largest; it falls as a cosine afterwards.
        seed: Of the order of the sequences.
        temperature: Divides the logits of both models.
        what: What is trained, names from `TRAINABLE`.
        precision: Of the matrix products; `auto` is bf16 where the device multiplies bf16 itself.
    """

    steps: int
    batch_tokens: int = 1024
    learning_rate: float = 3e-4
    warmup: float = 0.1
    seed: int = 0
    temperature: float = 1.0
    what: tuple[str, ...] = TRAINABLE
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"{self.steps} steps train nothing", where="--heal", fix="give at least 1")
        if self.batch_tokens < 2:
            raise InputError(f"{self.batch_tokens} tokens", where="batch_tokens", fix="give at least 2")
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{value} is out of range", where=name, fix="give a number above 0")
        if not 0 <= self.warmup < 1:
            raise InputError(f"{self.warmup} is no share of the steps", where="warmup", fix="0.1 is a tenth")
        if not self.what or set(self.what) - set(TRAINABLE):
            raise InputError(
                f"cannot train {list(self.what)}", where="what", fix=f"choose from {', '.join(TRAINABLE)}"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise InputError(
                f"unknown precision {self.precision!r}", where="precision", fix="choose auto, fp32 or bf16"
            )

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step from 0 to steps - 1."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (self.steps - rising))


@dataclass(frozen=True)
class HealResult:
    """What a recovery did.

    Args:
        losses: (step, loss) of every step, steps from 1; mean divergence per token in nats before the step.
        seconds: Time it took, over all its runs.
        tokens: Tokens that were trained on, repeats counted.
        finding: For the report.
    """

    losses: tuple[tuple[int, float], ...]
    seconds: float
    tokens: int
    finding: Finding


def heal(
    rewritten: Rewritten,
    source: ModelSource,
    tokens: Tensor,
    options: HealOptions,
    *,
    state: Path | None = None,
) -> HealResult:
    """Train a compressed model towards its dense one, in place.

    Args:
        rewritten: The compressed model; its plan says on which device it is trained.
        source: The dense model.
        tokens: Token ids (sequences, length), never those of a text the model is evaluated on.
        options: How to train.
        state: Progress is written there about every minute; started again with the same model, plan, tokens and
            options, the training goes on there, on CPU bit by bit as though it had never stopped.

    Raises:
        InputError: If the model predicts no next token, the tokens do not fit it, nothing of what was asked for
            can be trained, the state belongs to another run, or the loss is not finite.
    """
    _check(rewritten, tokens)
    device = resolve_device(rewritten.plan.options.device)
    dtype = _dtype(options.precision, device)
    home = rewritten.model.device
    file = StateFile(state, fingerprint(rewritten, tokens, {**asdict(options), "matmul": str(dtype)}))
    rewritten.model.to(device)
    with shared_products(rewritten.model), trainable(rewritten, options.what) as tensors:
        if not tensors:
            raise InputError(
                "the compressed model has none of them",
                where=f"what={','.join(options.what)}",
                fix=f"choose among {', '.join(TRAINABLE)}, or leave recovery out",
            )
        training = _Training(rewritten, source, tokens, options, tensors, dtype)
        training.restore(file.read())
        training.run(file)
    rewritten.model.to(home)
    return training.result()


class _Training:
    """The loop: between two steps everything that the next ones depend on is in `state`."""

    def __init__(
        self,
        rewritten: Rewritten,
        source: ModelSource,
        tokens: Tensor,
        options: HealOptions,
        tensors: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._model, self._options, self._tensors, self._dtype = rewritten.model, options, tensors, dtype
        self._device = rewritten.model.device
        self._batch = max(1, options.batch_tokens // tokens.shape[1])
        self._tokens = tokens[: options.steps * self._batch]
        self._head = Head(rewritten.model, rewritten.architecture, self._device, dtype)
        self._dense_head = dense_head(source, self._device, dtype)
        self._wanted = dense_states(source, self._tokens, self._device, dtype)
        peaks = {
            name: options.learning_rate * max(_rms(tensor), _SMALLEST_RMS) for name, tensor in tensors.items()
        }
        self._optimizer = torch.optim.AdamW(
            [{"params": [tensor], "peak": peaks[name]} for name, tensor in tensors.items()],
            betas=_BETAS,
            weight_decay=0.0,
            fused=True,
        )
        self._step, self._seconds = 0, 0.0
        self._losses: list[tuple[int, float]] = []

    def restore(self, state: TrainingState | None) -> None:
        """Go on from a state; None is the beginning."""
        if state is None:
            return
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(state.tensors[name])
        self._optimizer.load_state_dict(state.optimizer)
        self._step, self._losses, self._seconds = state.step, list(state.losses), state.seconds
        logger.info("recovery goes on after step %d of %d", self._step, self._options.steps)

    def run(self, file: StateFile) -> None:
        """Take the steps that are left."""
        steps, before, done = self._options.steps, self._seconds, self._step
        begin = time.monotonic()
        while self._step < steps:
            loss = self._take_step()
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} at step {self._step + 1}",
                    where="--heal",
                    fix="give a smaller learning rate",
                )
            self._step += 1
            self._losses.append((self._step, loss))
            now = time.monotonic() - begin
            self._seconds = before + now
            per_step = now / (self._step - done)
            logger.info(
                "recovery: step %d of %d, loss %.4f, %.0f tokens/s, %s left",
                self._step,
                steps,
                loss,
                self._batch * self._tokens.shape[1] / per_step,
                _clock((steps - self._step) * per_step),
            )
            if file.is_due or self._step == steps:
                file.write(self._state(file.run))

    def _take_step(self) -> float:
        """Take one optimizer step; return the mean loss of its tokens before it."""
        rows = batch_rows(self._step, self._batch, len(self._tokens), self._options.seed)
        together = max(1, _TOKENS_TOGETHER // self._tokens.shape[1])
        parts = [rows[begin : begin + together] for begin in range(0, len(rows), together)]
        loss = sum(self._backward(part, len(part) / len(rows)) for part in parts)
        torch.nn.utils.clip_grad_norm_(self._tensors.values(), _CLIP)
        rate = self._options.rate(self._step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _backward(self, rows: list[int], share: float) -> float:
        """Add the gradients of some sequences, weighted by their share of the step; return their part of its loss."""
        wanted = self._wanted[rows].flatten(0, 1).to(self._device)
        with matmuls_in(self._dtype, self._device):
            hidden = last_hidden(self._model, self._tokens[rows].to(self._device)).flatten(0, 1)
        temperature = self._options.temperature
        return share * backward_divergence(
            hidden, self._head, wanted, self._dense_head, temperature=temperature, share=share
        )

    def _state(self, run: str) -> TrainingState:
        tensors = {name: tensor.detach() for name, tensor in self._tensors.items()}
        return TrainingState(
            run, self._step, tuple(self._losses), self._seconds, tensors, self._optimizer.state_dict()
        )

    def result(self) -> HealResult:
        """Return what was done, over all runs."""
        tokens = self._step * self._batch * self._tokens.shape[1]
        details = {
            "pass": "heal",
            "steps": self._step,
            "tokens": tokens,
            "trained": sum(tensor.numel() for tensor in self._tensors.values()),
            "loss_first": self._losses[0][1],
            "loss_last": self._losses[-1][1],
            "seconds": round(self._seconds, 1),
        }
        return HealResult(
            tuple(self._losses), self._seconds, tokens, Finding("heal", Outcome.APPLIED, details=details)
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


def _check(rewritten: Rewritten, tokens: Tensor) -> None:
    config = rewritten.model.config
    if rewritten.architecture.is_encoder:
        raise InputError(
            f"{config.model_type} is an encoder: it predicts no next token",
            where="--heal",
            fix="leave it out",
        )
    if tokens.ndim != 2 or tokens.shape[0] < 1 or not 2 <= tokens.shape[1] <= config.max_position_embeddings:
        raise InputError(
            f"tokens of shape {tuple(tokens.shape)} cannot be trained on",
            where="tokens",
            fix=f"give (sequences, length) with a length from 2 to {config.max_position_embeddings}",
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise InputError(
            f"token ids from {int(tokens.min())} to {int(tokens.max())} are outside the vocabulary",
            where="tokens",
            fix=f"give ids from 0 to {config.vocab_size - 1}",
        )


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return matmul_dtype(device)
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
