"""Quantization of the token embedding and the output projection; a tied table is stored once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from rk_export.options.quantization import QuantSpec
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear, RotatedHead
from rk_export.passes.numerics.curvature import Inputs
from rk_export.passes.numerics.quantize import QuantizedMatrix, quantize_rtn, quantized_bytes
from rk_export.passes.weights.quantize import Quantize
from rk_export.report.records import Finding, Outcome


@torch.no_grad()
def quantize_embedding(
    model: PreTrainedModel,
    embedding_path: str,
    head_path: str | None,
    spec: QuantSpec,
    quantize: Quantize,
    head_inputs: Inputs | None = None,
) -> list[Finding]:
    """Quantize the embedding, and the output projection where there is one, with the rotation in front of it.

    Args:
        model: The model; its embedding and head are replaced.
        embedding_path: Torch path of the embedding.
        head_path: Torch path of the output projection; None for encoders.
        spec: Bits and blocks of both.
        quantize: The quantizer and its device.
        head_inputs: What the output projection reads (dim). A tied table is quantized under its moment: its errors
            count mostly in the logits.
    """
    embedding = model.get_submodule(embedding_path)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"{embedding_path} is {type(embedding).__name__}")
    head = None if head_path is None else model.get_submodule(head_path)
    inputs = None if head_inputs is None else head_inputs.to(quantize.device)
    tied = _projection(head) is embedding.weight
    matrix = quantize.quantizer.quantize(
        embedding.weight.detach().to(quantize.device), spec, inputs if tied else None
    )
    table = QuantizedEmbedding(matrix, embedding_multiplier(embedding)).to(embedding.weight.device)
    model.set_submodule(embedding_path, table)
    findings = [_finding(embedding_path, embedding.weight, matrix)]
    if head_path is None or head is None:
        return findings
    rotation: QuantizedLinear | None = None
    if isinstance(head, RotatedHead):
        rotation, finding = _quantized_rotation(head, f"{head_path}.rotation", spec, quantize)
        findings.append(finding)
        head = head.head
    if not isinstance(head, nn.Linear):
        raise TypeError(f"{head_path} is {type(head).__name__}")
    if tied:
        shared = tied_head(table, head.bias)
        model.set_submodule(head_path, shared if rotation is None else RotatedHead(rotation, shared))
    else:
        matrix = quantize.quantizer.quantize(head.weight.detach().to(quantize.device), spec, inputs)
        model.set_submodule(head_path, QuantizedLinear(matrix, head.bias).to(head.weight.device))
        findings.append(_finding(head_path, head.weight, matrix))
    return findings


def _projection(head: nn.Module | None) -> object:
    """Return the weight of an output projection, inside its rotation."""
    inner = head.head if isinstance(head, RotatedHead) else head
    return getattr(inner, "weight", None)


def rotation_spec(spec: QuantSpec) -> QuantSpec:
    """Return how the rotation in front of a tied head is quantized: in 8 bits, since every logit passes it."""
    return replace(spec, bits=8)


def _quantized_rotation(
    head: RotatedHead, target: str, spec: QuantSpec, quantize: Quantize
) -> tuple[QuantizedLinear, Finding]:
    dense = head.rotation
    if not isinstance(dense, nn.Linear):
        raise TypeError(f"{target} is {type(dense).__name__}")
    matrix = quantize_rtn(
        dense.weight.to(quantize.device), rotation_spec(spec), scale_dtype=quantize.scale_dtype
    )
    quantized = QuantizedLinear(matrix).to(dense.weight.device)
    return quantized, _finding(target, dense.weight, matrix)


def tied_head(table: QuantizedEmbedding, bias: torch.Tensor | None = None) -> QuantizedLinear:
    """Return an output projection that shares the embedding's packed table."""
    matrix = QuantizedMatrix(table.codes, table.scales, table.zero_points, table.embedding_dim, table.spec)
    return QuantizedLinear(matrix, bias)


def embedding_multiplier(embedding: nn.Module) -> float:
    """Return the factor that a family's embedding module applies to its rows (Gemma: the root of d)."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def _finding(target: str, dense: torch.Tensor, matrix: QuantizedMatrix) -> Finding:
    rows, columns = dense.shape
    return Finding(
        target=target,
        outcome=Outcome.APPLIED,
        bytes_before=dense.numel() * dense.element_size(),
        bytes_after=quantized_bytes(rows, columns, matrix.spec, matrix.scales.element_size()),
        error=matrix.relative_error(dense),
        details={"pass": "quantize", "bits": matrix.spec.bits, "block": matrix.spec.block_size},
    )
