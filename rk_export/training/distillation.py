"""The loss of recovery: how far a student's next-token distribution is from its dense teacher's.

A vocabulary is wide: logits are made some rows at a time, and the gradient by the last hidden state is taken
before the next rows are computed, so that memory does not grow with the number of tokens.
"""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.streams import Streams
from rk_export.calibration.text_run import LOGITS_TOGETHER
from rk_export.device import matmuls_in
from rk_export.model.description import ModelDescription
from rk_export.model.families.registry import architecture_of
from rk_export.passes.modules.quantized import float_inputs
from rk_export.progress import track
from rk_export.scratch import laid_down, zeros
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cached
from rk_export.training.recompute import recomputed

DENSE = "dense"

_VERSION = 1  # raise when other states come out: cached ones of an older version are then computed again
_ROWS = 256  # tokens whose logits exist at a time, fewer where the vocabulary is large
_TOGETHER = 2048  # tokens that run through a dense layer together


class Head:
    """The output projection of a decoder as one dense matrix, whatever modules it is made of.

    Args:
        model: A decoder; its head maps hidden states affinely to logits.
        description: Of the model.
        device: Where it is used.
        dtype: Float type of the products; logits come in float32.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, description: ModelDescription, device: torch.device, dtype: torch.dtype
    ) -> None:
        if description.architecture.lm_head is None:
            raise ValueError(f"{description.model_type} has no output projection")
        spec = description.decoder
        self.scale, self.softcap = spec.logit_scale, spec.logit_softcap
        module = model.get_submodule(description.architecture.lm_head)
        weight, bias = _affine(module, spec.hidden_size)
        self.weight = laid_down(weight.to(device, dtype), untouched=True)
        self.bias = None if bias is None else bias.to(device)

    @property
    def rows(self) -> int:
        """Tokens whose logits may exist at a time."""
        return max(1, min(_ROWS, LOGITS_TOGETHER // len(self.weight)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (tokens, vocabulary) of hidden states (tokens, d)."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight).float()
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def _affine(module: nn.Module, width: int) -> tuple[Tensor, Tensor | None]:
    """Return W (out, in) and b (out,) of a module that computes W x + b; b is None where it is zero."""
    if isinstance(module, nn.Linear):
        return module.weight.detach(), module.bias
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    with float_inputs(module):
        bias: Tensor = module(torch.zeros(1, width, device=device))
        together = max(1, LOGITS_TOGETHER // bias.shape[1])
        weight = zeros((bias.shape[1], width), device=device)
        for columns in torch.split(torch.arange(width, device=device), together):
            units = nn.functional.one_hot(columns, width).float()
            weight[:, columns[0] : columns[-1] + 1] = (module(units) - bias).T
    return weight, bias[0] if bool(bias.any()) else None


def last_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return what the head reads, (batch, length, d), of token ids (batch, length), to be differentiated."""
    layers = model.get_submodule(architecture_of(model.config).layers)
    with recomputed(layers.children()):
        states: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return states


def dense_head(source: Source, device: torch.device, dtype: torch.dtype) -> Head:
    """Return the head of a dense model; its layers are not read."""
    model = source.skeleton()
    source.load_rest(model)
    return Head(model, source.description, device, dtype)


def dense_states(source: Source, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what the head of a dense model reads for given tokens, or what was computed earlier.

    One layer of the model is in memory at a time. The states depend on weights and tokens alone, so they are kept
    on disk: a recovery that goes on, or one after another compression, finds them there.

    Args:
        source: The dense model.
        tokens: Token ids (sequences, length).
        device: Where it runs.
        dtype: Float type of its matrix products, and of the states.

    Returns:
        (sequences, length, d), on disk, mapped.
    """
    key = {
        "version": _VERSION,
        "weights": source.fingerprint(),
        "tokens": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "dtype": str(dtype),
        "device": device.type,
    }

    def make() -> dict[str, Tensor]:
        return {"states": _run_dense(source, tokens, device, dtype)}

    return cached("dense-states", key, make)["states"]


@torch.no_grad()
def _run_dense(source: Source, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    model = source.skeleton()
    source.load_rest(model)
    layers = model.get_submodule(source.architecture.layers)
    if source.architecture.lm_head is None or not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{source.architecture.model_type} is no decoder")
    head = _Reader()
    model.set_submodule(source.architecture.lm_head, head)
    rows = max(1, _TOGETHER // tokens.shape[1])
    groups = [Streams(model, layers, group) for group in torch.split(tokens, rows)]
    for group in groups:
        group.start(DENSE)
        group.hidden[DENSE] = laid_down(group.hidden[DENSE])
    for index in track(range(source.layer_count), "running the dense model, layers"):
        layer = source.load_layer(model, index).to(device)
        with matmuls_in(dtype, device):
            for group in groups:
                group.hidden[DENSE] = laid_down(group.advance(DENSE, index).cpu())
        layer.to("meta")
    states = zeros((*tokens.shape, source.config.hidden_size), dtype)
    for group, place in zip(groups, torch.split(states, rows), strict=True):
        place.copy_(head.input_of(group))
    return states


class _Reader(nn.Module):
    """Stands where the head stood and keeps what it would read."""

    def forward(self, x: Tensor) -> Tensor:
        self._read = x
        return x

    def input_of(self, streams: Streams) -> Tensor:
        """Return what the head reads, (batch, length, d), once a dense version has passed all layers."""
        streams.finish(DENSE)
        return self._read


def backward_divergence(
    hidden: Tensor, student: Head, wanted: Tensor, teacher: Head, *, temperature: float, share: float
) -> float:
    """Add the gradients of share · T² · KL(teacher || student), averaged over tokens; return the mean KL.

    Args:
        hidden: The student's last hidden states (tokens, d), part of a graph.
        student: Its head.
        wanted: The teacher's last hidden states (tokens, d').
        teacher: Its head.
        temperature: T, divides both models' logits.
        share: Weight of these tokens in the step.

    Returns:
        The mean of T² · KL over the tokens, in nats, without `share`.
    """
    leaf = hidden.detach().requires_grad_(True)
    total = 0.0
    for begin in range(0, len(leaf), student.rows):
        rows = slice(begin, begin + student.rows)
        with torch.no_grad():
            target = torch.log_softmax(teacher.logits(wanted[rows]) / temperature, dim=-1)
        predicted = torch.log_softmax(student.logits(leaf[rows]) / temperature, dim=-1)
        loss = nn.functional.kl_div(predicted, target, reduction="sum", log_target=True)
        loss = loss * (temperature**2 / len(leaf))
        (loss * share).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return total
