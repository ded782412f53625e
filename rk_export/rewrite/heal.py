"""Recovery: a short distillation of a compressed model against the dense one, in place and resumable.

The dense model's next-token distribution on given tokens is the target (forward Kullback-Leibler divergence,
1503.02531); factors, norms, biases and quantization scales are trained, codes and dense matrices stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rk_export.device import matmul_dtype, matmuls_in, resolve_device
from rk_export.errors import InputError
from rk_export.report.records import Finding, Outcome
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.shared_products import shared_products
from rk_export.rewrite.trainable import TRAINABLE, trainable
from rk_export.source.protocol import Source
from rk_export.training.distillation import Head, backward_divergence, dense_head, dense_states, last_hidden
from rk_export.training.loop import SMALLEST_SCALE, Training, check_tokens, root_mean_square
from rk_export.training.state import StateFile, TrainingState, run_fingerprint


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
    source: Source,
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
        training = _Recovery(rewritten, source, tokens, options, tensors, dtype)
        training.restore(file.read())
        training.run(file)
    rewritten.model.to(home)
    return training.result()


class _Recovery(Training):
    """The compressed model's training towards the dense one's next-token distribution."""

    def __init__(
        self,
        rewritten: Rewritten,
        source: Source,
        tokens: Tensor,
        options: HealOptions,
        tensors: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__("recovery", "--heal", tokens, options.batch_tokens, options.steps, options.seed)
        self._tokens = tokens[: options.steps * self._batch]
        self._model, self._options, self._tensors, self._dtype = rewritten.model, options, tensors, dtype
        self._device = rewritten.model.device
        self._head = Head(rewritten.model, rewritten.description, self._device, dtype)
        self._dense_head = dense_head(source, self._device, dtype)
        self._wanted = dense_states(source, self._tokens, self._device, dtype)
        self._optimize(
            {
                name: options.learning_rate * max(root_mean_square(tensor), SMALLEST_SCALE)
                for name, tensor in tensors.items()
            }
        )

    def restore(self, state: TrainingState | None) -> None:
        """Go on from a state; None is the beginning."""
        if state is not None:
            self._restore_trained(state)
            self._resume(state)

    def _trained(self) -> dict[str, Tensor]:
        return self._tensors

    def _rate(self) -> float:
        return self._options.rate(self.step)

    def _backward(self, rows: list[int], share: float) -> float:
        wanted = self._wanted[rows].flatten(0, 1).to(self._device)
        with matmuls_in(self._dtype, self._device):
            hidden = last_hidden(self._model, self._tokens[rows].to(self._device)).flatten(0, 1)
        temperature = self._options.temperature
        return share * backward_divergence(
            hidden, self._head, wanted, self._dense_head, temperature=temperature, share=share
        )

    def result(self) -> HealResult:
        """Return what was done, over all runs."""
        tokens = self.step * self.batch_tokens
        details = {
            "pass": "heal",
            "steps": self.step,
            "tokens": tokens,
            "trained": sum(tensor.numel() for tensor in self._tensors.values()),
            "loss_first": self.losses[0][1],
            "loss_last": self.losses[-1][1],
            "seconds": round(self.seconds, 1),
        }
        return HealResult(
            tuple(self.losses), self.seconds, tokens, Finding("heal", Outcome.APPLIED, details=details)
        )


def _check(rewritten: Rewritten, tokens: Tensor) -> None:
    config = rewritten.model.config
    if rewritten.architecture.is_encoder:
        raise InputError(
            f"{config.model_type} is an encoder: it predicts no next token",
            where="--heal",
            fix="leave it out",
        )
    check_tokens(config, tokens)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return matmul_dtype(device)
    return torch.bfloat16 if precision == "bf16" else torch.float32


def fingerprint(rewritten: Rewritten, tokens: Tensor, choices: Mapping[str, object]) -> str:
    """Return a fingerprint of a run: plan, first values of every tensor before it, tokens, and choices."""
    return run_fingerprint(rewritten.model, tokens, (rewritten.plan.to_json(), sorted(choices.items())))
