"""From canonical modules back to the tensors of a plain Hugging Face model; the inverse of `canonical`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rk_export.model.canonical import EachHeadNorm, Experts, JoinedLinear
from rk_export.model.torch_models import empty_model


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a dense canonical model as its Hugging Face class has it; separate linears are joined again.

    The config is a copy of the model's. Tensors that need no joining are shared with `model`.
    """
    plain = empty_model(copy.deepcopy(model.config))
    plain.load_state_dict(_hugging_face_tensors(model, plain), assign=True)
    plain.tie_weights()
    return plain.requires_grad_(False)


def _hugging_face_tensors(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for path, module in model.named_modules():
        joined = _parts(module)
        if joined is not None:
            inside = [name for name in tensors if name.startswith(f"{path}.")]
            for name in inside:
                del tensors[name]
            tensors |= {f"{path}.{name}": tensor for name, tensor in joined.items()}
    for path, module in plain.named_modules():
        if isinstance(module, Conv1D):
            tensors[f"{path}.weight"] = tensors[f"{path}.weight"].T.contiguous()
    return tensors


def _parts(module: nn.Module) -> dict[str, Tensor] | None:
    """Return what stands in Hugging Face's model instead of a canonical module, None where it is no such module."""
    if isinstance(module, JoinedLinear):
        return joined_linear(module)
    if isinstance(module, Experts):
        return stacked_experts(module)
    if isinstance(module, EachHeadNorm):
        return {f"norms.{number}.weight": gain for number, gain in enumerate(module.weight)}
    return None


def joined_linear(module: JoinedLinear) -> dict[str, Tensor]:
    """Return weight (sum of out, in) and, where there is one, bias of the joined matrix."""
    parts = [child.state_dict() for child in module.children()]
    return {name: module.joined([part[name] for part in parts], dim=0) for name in parts[0]}


def stacked_experts(experts: Experts) -> dict[str, Tensor]:
    """Return gate_up_proj (experts, 2 * intermediate, hidden) and down_proj (experts, hidden, intermediate)."""
    parts = [expert.state_dict() for expert in experts]
    gate_up = [torch.cat([part["gate_proj.weight"], part["up_proj.weight"]]) for part in parts]
    return {
        "gate_up_proj": torch.stack(gate_up),
        "down_proj": torch.stack([part["down_proj.weight"] for part in parts]),
    }
