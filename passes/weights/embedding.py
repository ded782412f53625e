"""Quantization of the token embedding and the output projection; a tied table is stored once."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from rk_export.options import QuantSpec
from rk_export.passes.modules import QuantizedEmbedding, QuantizedLinear
from rk_export.passes.numerics.quantize import QuantizedMatrix, quantize_rtn, quantized_bytes
from rk_export.passes.weights.quantize import Quantize
from rk_export.report import Finding, Outcome


@torch.no_grad()
def quantize_embedding(
    model: PreTrainedModel, embedding_path: str, head_path: str | None, spec: QuantSpec, quantize: Quantize
) -> list[Finding]:
    """Quantize the embedding, and the output projection where there is one."""
    embedding = model.get_submodule(embedding_path)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"{embedding_path} is {type(embedding).__name__}")
    matrix = quantize_rtn(embedding.weight.to(quantize.device), spec, scale_dtype=quantize.scale_dtype)
    table = QuantizedEmbedding(matrix, embedding_multiplier(embedding)).to(embedding.weight.device)
    model.set_submodule(embedding_path, table)
    findings = [_finding(embedding_path, embedding.weight, table.weight, matrix)]
    if head_path is None:
        return findings
    head = model.get_submodule(head_path)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"{head_path} is {type(head).__name__}")
    if head.weight is embedding.weight:
        model.set_submodule(head_path, tied_head(table, head.bias))
    else:
        quantized = quantize.quantize(head, spec)
        model.set_submodule(head_path, quantized)
        findings.append(_finding(head_path, head.weight, quantized.weight, matrix))
    return findings


def tied_head(table: QuantizedEmbedding, bias: torch.Tensor | None = None) -> QuantizedLinear:
    """Return an output projection that shares the embedding's packed table."""
    matrix = QuantizedMatrix(table.codes, table.scales, table.zero_points, table.embedding_dim, table.spec)
    return QuantizedLinear(matrix, bias)


def embedding_multiplier(embedding: nn.Module) -> float:
    """Return the factor that a family's embedding module applies to its rows (Gemma: the root of d)."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def _finding(target: str, dense: torch.Tensor, quantized: torch.Tensor, matrix: QuantizedMatrix) -> Finding:
    rows, columns = dense.shape
    return Finding(
        target=target,
        outcome=Outcome.APPLIED,
        bytes_before=dense.numel() * dense.element_size(),
        bytes_after=quantized_bytes(rows, columns, matrix.spec, matrix.scales.element_size()),
        error=float((quantized - dense).norm() / dense.norm()),
        details={"pass": "quantize", "bits": matrix.spec.bits, "block": matrix.spec.block_size},
    )
