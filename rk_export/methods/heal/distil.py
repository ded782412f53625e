"""Recovery: a short distillation of a compressed model against the dense one, in place and resumable.

The dense model's next-token distribution on given tokens is the target (forward Kullback-Leibler divergence,
1503.02531); factors, norms, biases and quantization scales are trained, codes and dense matrices stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rk_export.device import CPU, matmul_dtype, matmuls_in
from rk_export.errors import InputError
from rk_export.methods.heal.options import TRAINABLE, HealOptions
from rk_export.methods.heal.shared_products import shared_products
from rk_export.methods.heal.trainable import trainable
from rk_export.report.records import Finding, Outcome
from rk_export.rewrite.apply import Rewritten
from rk_export.source.protocol import Source
from rk_export.training.distillation import Head, backward_divergence, dense_head, dense_states, last_hidden
from rk_export.training.loop import SMALLEST_SCALE, Training, check_tokens, root_mean_square
from rk_export.training.state import StateFile, TrainingState, run_fingerprint


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
    device: torch.device = CPU,
    state: Path | None = None,
) -> HealResult:
    """Train a compressed model towards its dense one, in place.

    Args:
        rewritten: The compressed model.
        source: The dense model.
        tokens: Token ids (sequences, length), never those of a text the model is evaluated on.
        options: How to train.
        device: Where it is trained.
        state: Progress is written there about every minute; started again with the same model, plan, tokens and
            options, the training goes on there, on CPU bit by bit as though it had never stopped.

    Raises:
        InputError: If the model predicts no next token, the tokens do not fit it, nothing of what was asked for
            can be trained, the state belongs to another run, or the loss is not finite.
    """
    _check(rewritten, tokens)
    dtype = _dtype(options.precision, device)
    home = rewritten.model.device
    file = StateFile(state, fingerprint(rewritten, tokens, {**asdict(options), "matmul": str(dtype)}))
    rewritten.model.to(device)
    with shared_products(rewritten.model), trainable(rewritten, options.what) as tensors:
        if not tensors:
            raise InputError(
                "the compressed model has none of them",
                where="heal.what",
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
        super().__init__("recovery", "heal", tokens, options.batch_tokens, options.steps, options.seed)
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
            where="heal",
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
