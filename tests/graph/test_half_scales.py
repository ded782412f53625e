"""Scales stored in fp16: one Cast a tensor, the same results, nothing left of it when a session has loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from compressed import INT4, OnnxModel, SourceOf, compress, floats, logits, tokens

from rk_export.errors import InputError
from rk_export.graph.build import build_graph
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear
from rk_export.passes.numerics.quantize import dequantize, quantize_rtn, rounded_scales
from rk_export.rewrite.sizes import size_summary

OPTIONS = {
    "dense": floats(quant=INT4, table=QuantSpec(8, 16)),
    "asymmetric": floats(quant=QuantSpec(4, 32, False), table=QuantSpec(8, 32, False)),
    "factors": floats(("qk", "gate_up"), rank=RankRule("rank", 8), quant=INT4),
}


@pytest.mark.whole
@pytest.mark.parametrize("form", OPTIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_runtime_folds_every_cast(source_of: SourceOf, tmp_path: Path, form: str, tied: bool) -> None:
    source = source_of("llama", tie_word_embeddings=tied)
    rewritten = compress(source, OPTIONS[form])
    model, ids = OnnxModel(rewritten, tmp_path), tokens(source)
    expected = logits(rewritten.model, ids)
    assert float((model.run(ids)[0] - expected).abs().max()) <= 1e-4 * float(expected.abs().max())

    before = Counter(node.op_type for node in model.graph.graph)
    halves = [
        value for value in model.graph.graph.initializers.values() if value.dtype is ir.DataType.FLOAT16
    ]
    assert before["Cast"] >= len(halves) == model.fusion("fp16 scales").found > 0
    assert all(len(value.uses()) == 1 for value in halves)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in optimized.initializer}
    read = [name for node in optimized.node if node.op_type == "Cast" for name in node.input]
    assert not any(kinds.get(name) == onnx.TensorProto.FLOAT16 for name in read)
    scales = [
        node.input[2] for node in optimized.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    ]
    assert {kinds[name] for name in scales} == {onnx.TensorProto.FLOAT}


def test_the_summary_counts_two_bytes_a_scale(source_of: SourceOf) -> None:
    source = source_of("llama")
    rewritten = compress(source, OPTIONS["dense"])
    kinds = QuantizedLinear | QuantizedEmbedding
    modules = [module for module in rewritten.model.modules() if isinstance(module, kinds)]
    packed = {module.codes.data_ptr(): module.codes.numel() + 2 * module.scales.numel() for module in modules}
    floats_left = sum(4 * parameter.numel() for parameter in rewritten.model.parameters())
    assert size_summary(source, rewritten, None).compressed_bytes == sum(packed.values()) + floats_left


@pytest.mark.whole
def test_wider_scales_stay_as_they_are(source_of: SourceOf) -> None:
    """A checkpoint of an older version holds float32 scales."""
    rewritten = compress(source_of("llama"), OPTIONS["dense"])
    for module in rewritten.model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            module.scales = module.scales.float()
    graph, fusions = build_graph(rewritten)
    assert not any(fusion.pattern == "fp16 scales" for fusion in fusions)
    assert not any(value.dtype is ir.DataType.FLOAT16 for value in graph.graph.initializers.values())


@pytest.mark.parametrize("magnitude", [1e-3, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_below_the_normal_range_never_clip(magnitude: float, bits: int) -> None:
    """The error stays within half a step of the stored scale."""
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * magnitude
    matrix = quantize_rtn(W, QuantSpec(bits, 32, symmetric=False), scale_dtype=torch.float16)
    step = matrix.scales.float().abs().repeat_interleave(32, 1)
    assert bool((step > 0).all())
    slack = (
        1e-3 * 2**bits if magnitude > 1e-4 else 0.01
    )  # in the normal range the last code may clip a little
    assert bool(((matrix.dequantize() - W).abs() <= step * (0.5 + slack)).all())


def test_rounded_scales() -> None:
    scales = torch.tensor([0.0, -1e-9, 3e-8, 6.1e-8, -1e-5, 0.3, -65504.0])
    rounded = rounded_scales(scales, torch.float16)
    assert rounded.dtype is torch.float16
    tiny = rounded[:5].float()
    assert bool((tiny.abs() >= scales[:5].abs()).all())
    assert torch.equal(tiny.sign(), scales[:5].sign())
    assert float((tiny.abs() - scales[:5].abs()).max()) <= 2**-24
    assert rounded[5:].tolist() == scales[5:].half().tolist()
    with pytest.raises(InputError, match="fp16"):
        rounded_scales(torch.tensor([7e4]), torch.float16)
    assert rounded_scales(scales, torch.float32) is scales


def test_dequantization_multiplies_in_float32() -> None:
    """As the graph does after its Cast: a product rounded to fp16 would differ."""
    matrix = quantize_rtn(torch.randn(8, 64), QuantSpec(8, 32), scale_dtype=torch.float16)
    values = dequantize(matrix.codes, matrix.scales, None, 64, matrix.spec)
    wide = dequantize(matrix.codes, matrix.scales.float(), None, 64, matrix.spec)
    assert values.dtype is torch.float32
    assert torch.equal(values, wide)
