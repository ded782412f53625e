"""Basel: the directions of every matrix that a target task needs, chosen while they are trained on it (2405.15877).

Every linear layer of the decoder becomes U diag(w²) V + U_add V_add + b with singular directions U and V. The
coefficients w, the new bases, biases and norms are trained on the task's text by the language-model loss while
directions are dropped. What comes out are plain matrices of known rank: a factor pair of that rank is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.sensitivity import dense_statistics
from rk_export.device import matmul_dtype
from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.methods.basel.modules import BasisLinear
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.basel.training import BasisTraining
from rk_export.model.architecture import Projection
from rk_export.options.ranks import RankRule
from rk_export.passes.numerics.basis import PairSize
from rk_export.passes.numerics.metric import Metric
from rk_export.progress import track
from rk_export.report.records import Finding, Outcome
from rk_export.scratch import laid_down
from rk_export.source.protocol import Source
from rk_export.training.distillation import Head
from rk_export.training.loop import check_tokens
from rk_export.training.state import StateFile, run_fingerprint

_MOMENT_TOKENS = 16_384  # of the text, for whitened directions


@dataclass(frozen=True)
class Selection:
    """What basis selection made of a model.

    Args:
        tensors: New values of all that was trained, float32 on CPU: matrices and biases as
            `layers.3.self_attn.q_proj.weight` (paths of canonical layers), norms as `layers.3.input_layernorm.weight`,
            the final norm as the model names it.
        ranks: Layer and path of every matrix -> rank of its factor pair, which is exact; 0 where the dense matrix is
            no larger than the pair and stays.
        finding: For the report.
        losses: (step, mean loss per token in nats before it), steps from 1.
    """

    tensors: dict[str, Tensor]
    ranks: dict[MatrixId, int]
    finding: Finding
    losses: tuple[tuple[int, float], ...]


def select_basis(
    source: Source,
    tokens: Tensor,
    rank: RankRule,
    options: BaselOptions,
    *,
    device: torch.device,
    state: Path | None = None,
) -> Selection:
    """Choose and train the directions of all linear layers of a decoder for the task of a text.

    Args:
        source: The dense model.
        tokens: Token ids of the task's text (sequences, length), never those of a text it is evaluated on.
        rank: `keep`: the share of the linear layers' parameters that is stored at the end; `energy`: the share of
            each matrix' importance that is kept, K of the paper.
        options: How to train.
        device: Where.
        state: Progress is written there about every minute; started again with the same model, tokens, rank and
            options, the training goes on there, on CPU bit by bit as though it had never stopped.

    Raises:
        InputError: Before any work, if the model is an encoder or has experts, the tokens do not fit it, or the
            rank rule cannot be met; later, if the state belongs to another run or the loss is not finite.
    """
    check_selection(source, rank, options)
    check_tokens(source.config, tokens)
    dtype = matmul_dtype(device)
    inputs = _target_moments(source, tokens, device) if options.bases == "whitened" else {}
    model = source.load()
    choices = (asdict(rank), sorted({**asdict(options), "target": "", "matmul": str(dtype)}.items()))
    file = StateFile(state, run_fingerprint(model, tokens, choices), "basis selection")
    earlier = file.read()
    model.to(device)
    head = Head(model, source.description, device, dtype)
    modules = _decompose(model, source, options, dtype, inputs)
    others = _norms(model, source)
    for tensor in others.values():
        tensor.requires_grad_(True)
    named = {matrix.name: module for matrix, module in modules.items()}
    training = BasisTraining(model, named, others, head, tokens, rank, options, dtype)
    training.restore(earlier)
    training.run(file)
    return _selection(modules, others, training, options)


def check_selection(source: Source, rank: RankRule, options: BaselOptions) -> None:
    """Refuse, by shapes alone, what basis selection cannot do.

    Raises:
        InputError: If the model is an encoder or has experts, or the rank rule cannot be met.
    """
    config = source.config
    if source.architecture.is_encoder:
        raise InputError(
            f"{config.model_type} is an encoder: it predicts no next token to be trained by",
            where="basel",
            fix="name a decoder",
        )
    if any(item.role == "expert" for _, item in _projections(source)):
        raise InputError(
            f"{config.model_type} has experts: each sees the few tokens that are routed to it, too few to choose by",
            where="basel",
            fix="name a model without experts",
        )
    if rank.kind == "rank":
        raise InputError(
            f"one rank {rank.value:.0f} for all matrices leaves nothing to choose",
            where="basel",
            fix="give keep or energy",
        )
    sizes = _sizes(source, options.new_basis)
    least = sum(size.stored(1) for size in sizes) / sum(size.dense for size in sizes)
    if rank.kind == "keep" and rank.value < least:
        raise InputError(
            f"new bases of rank {options.new_basis} and one direction of each matrix hold {least:.4f} of the "
            f"parameters already, more than {rank.value}",
            where="basel.keep",
            fix="keep more, or give the new bases a smaller rank",
        )


def _projections(source: Source) -> Iterator[tuple[int, Projection]]:
    for layer in range(source.layer_count):
        for item in source.description.projections(layer):
            yield layer, item


def _sizes(source: Source, new_basis: int) -> list[PairSize]:
    return [PairSize(*matrix.shape, new_basis) for matrix in source.description.matrices]


def _target_moments(source: Source, tokens: Tensor, device: torch.device) -> Mapping[MatrixId, Tensor]:
    """Return the second moment of what every matrix reads on the first of the task's text."""
    sequences = max(1, _MOMENT_TOKENS // tokens.shape[1])
    statistics = dense_statistics(source, tokens[:sequences], diagonal=True, device=device, gradient_tokens=1)
    return statistics.second


def _decompose(
    model: PreTrainedModel,
    source: Source,
    options: BaselOptions,
    dtype: torch.dtype,
    inputs: Mapping[MatrixId, Tensor],
) -> dict[MatrixId, BasisLinear]:
    """Replace every linear layer by its directions, in place; return the new modules."""
    generator = torch.Generator().manual_seed(options.seed)
    modules: dict[MatrixId, BasisLinear] = {}
    model.requires_grad_(False)
    for index, item in track(list(_projections(source)), "singular directions, matrices"):
        path = f"{source.architecture.layers}.{index}.{item.path}"
        linear = cast(nn.Linear, model.get_submodule(path))
        matrix = MatrixId(index, item.path)
        metric = Metric.of(inputs[matrix].to(linear.weight.device)) if inputs else None
        modules[matrix] = BasisLinear(linear, options.new_basis, generator, dtype, metric)
        model.set_submodule(path, modules[matrix])
    return modules


def _norms(model: PreTrainedModel, source: Source) -> dict[str, Tensor]:
    """Return gains and biases of all norms: vectors that belong to no matrix, embedding or head."""
    architecture = source.architecture
    matrices = [name for name, module in model.named_modules() if isinstance(module, BasisLinear)]
    outside = [*matrices, architecture.embedding, cast(str, architecture.lm_head)]
    prefixes = tuple(f"{name}." for name in outside)
    inner = f"{architecture.layers}."
    return {
        f"layers.{name.removeprefix(inner)}" if name.startswith(inner) else name: tensor
        for name, tensor in model.named_parameters()
        if tensor.ndim == 1 and not name.startswith(prefixes)
    }


def _selection(
    modules: dict[MatrixId, BasisLinear],
    norms: dict[str, Tensor],
    training: BasisTraining,
    options: BaselOptions,
) -> Selection:
    tensors, ranks = {}, {}
    for matrix, module in modules.items():
        size, count = module.size, len(module.coefficients)
        tensors[matrix.weight] = _float32(module.folded())
        if module.bias is not None:
            tensors[f"{matrix.name}.bias"] = _float32(module.bias)
        ranks[matrix] = count + size.extra if size.pair(count) < size.dense else 0
    tensors |= {name: _float32(tensor) for name, tensor in norms.items()}
    finding = _finding(modules, ranks, training, options)
    return Selection(tensors, ranks, finding, tuple(training.losses))


def _float32(tensor: Tensor) -> Tensor:
    return laid_down(tensor.detach().to("cpu", torch.float32, copy=True))


def _finding(
    modules: dict[MatrixId, BasisLinear],
    ranks: dict[MatrixId, int],
    training: BasisTraining,
    options: BaselOptions,
) -> Finding:
    dense = sum(module.size.dense for module in modules.values())
    stored = sum(module.size.stored(len(module.coefficients)) for module in modules.values())
    whole = [matrix.name for matrix, rank in ranks.items() if rank == 0]
    pairs = [rank for rank in ranks.values() if rank]
    details: dict[str, Any] = {
        "pass": "basel",
        "importance": options.importance,
        "bases": options.bases,
        "new_basis": options.new_basis,
        "steps": options.steps,
        "tune": options.tune,
        "tokens": training.step * training.batch_tokens,
        "kept": stored / dense,
        "smallest_rank": min(pairs, default=0),
        "largest_rank": max(pairs, default=0),
        "loss_first": training.losses[0][1],
        "loss_last": training.losses[-1][1],
        "seconds": round(training.seconds, 1),
    }
    if whole:
        details["dense"] = {"why": "a factor pair would be no smaller", "matrices": whole}
    # No bytes: the factor pairs that follow account for them, matrix by matrix.
    return Finding("basel", Outcome.APPLIED, details=details)
