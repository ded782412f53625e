"""Checkpoints that are stored quantized, against the model with the values that their codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_files import edit_config
from compressed_models import arguments, compressed, compressed_config
from quantized_models import (
    AWQ_CONFIG,
    BITSANDBYTES,
    Quantizer,
    awq,
    change_tensors,
    fp8,
    fp8_config,
    gptq,
    gptq_config,
    save_bitsandbytes,
    save_quantized,
    without,
)
from tiny_models import tiny_model, transformers_own

from input_cases.case import Build, Case, Given
from rk_export import Recipe
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.quantize import Quantize

Change = Callable[[Path], object]
SIZES = {"num_hidden_layers": 2, "hidden_size": 128}
# Every matrix keeps its codes; what has none stays in floats.
CARRIED = Recipe((Quantize(quantizer="carry"),), UNWEIGHED)


def quantized(
    config: dict[str, Any] | None,
    quantize: Quantizer,
    *changes: Change,
    family: str = "llama",
    recipe: Recipe | None = None,
) -> Build:
    """Return what writes a quantized checkpoint and changes its folder."""

    def build(folder: Path) -> Given:
        model = folder / "model"
        reference = save_quantized(tiny_model(family, **SIZES), model, config, quantize)
        for change in changes:
            change(model)
        return Given(model, reference.eval, recipe=recipe)

    return build


def bitsandbytes(kind: str) -> Build:
    """Return what writes a checkpoint with bitsandbytes, to be compared with transformers' dequantized model."""

    def build(folder: Path) -> Given:
        model = save_bitsandbytes(folder, "llama", BITSANDBYTES[kind])
        return Given(model, lambda: transformers_own(model).dequantize().float().eval())

    return build


def losing(suffix: str) -> Change:
    """Return what drops the tensors of a name."""
    return lambda folder: change_tensors(folder, without(suffix))


def floats_under_a_config(folder: Path) -> Given:
    """Matrices in floats under a quantization_config."""
    tiny_model("llama").save_pretrained(folder / "model")
    edit_config(folder / "model", quantization_config=gptq_config())
    return Given(folder / "model")


INT4, INT8 = arguments(4, "group", symmetric=False), arguments(8, "channel", symmetric=True)
FLOAT8 = arguments(8, "channel", symmetric=True, kind="float")

CASES = (
    Case("GPTQ", "4 bits in groups of 32, zero points", "dequantized", quantized(gptq_config(), gptq())),
    Case(
        "GPTQ, symmetric",
        "4 bits in groups of 32, symmetric",
        "dequantized",
        quantized(gptq_config(sym=True), gptq(symmetric=True)),
    ),
    Case(
        "GPTQ, desc_act",
        "4 bits, columns in groups out of order",
        "dequantized",
        quantized(gptq_config(desc_act=True), gptq(act_order=True)),
    ),
    Case(
        "GPTQ, 8 bits",
        "8 bits, one group a row",
        "dequantized",
        quantized(gptq_config(bits=8, group_size=-1), gptq(bits=8, size=-1)),
    ),
    Case(
        "GPTQ, 3 bits",
        "3 bits in groups of 64",
        "dequantized",
        quantized(gptq_config(bits=3, group_size=64), gptq(bits=3, size=64)),
    ),
    Case(
        "gptq_v2",
        "GPTQModel's second layout",
        "dequantized",
        quantized(gptq_config(checkpoint_format="gptq_v2"), gptq(2)),
    ),
    Case(
        "GPTQ of fused matrices",
        "a Phi-3 with qkv_proj and gate_up_proj",
        "dequantized",
        quantized(gptq_config(), gptq(), family="phi3"),
    ),
    Case(
        "GPTQ, codes kept",
        "--recipe carry",
        "carried",
        quantized(gptq_config(), gptq(), recipe=CARRIED),
        "compress",
    ),
    Case("AWQ", "4 bits in groups of 32", "dequantized", quantized(AWQ_CONFIG, awq)),
    Case("AWQ of experts", "a Mixtral", "dequantized", quantized(AWQ_CONFIG, awq, family="mixtral")),
    Case(
        "AWQ, codes kept",
        "--recipe carry",
        "carried",
        quantized(AWQ_CONFIG, awq, recipe=CARRIED),
        "compress",
    ),
    Case(
        "compressed-tensors, INT4",
        "pack-quantized, 4 bits in groups of 32",
        "dequantized",
        quantized(compressed_config("pack-quantized", INT4), compressed("pack-quantized", INT4)),
    ),
    Case(
        "compressed-tensors, INT8",
        "int-quantized, 8 bits by row",
        "dequantized",
        quantized(compressed_config("int-quantized", INT8), compressed("int-quantized", INT8)),
    ),
    Case(
        "compressed-tensors, FP8",
        "float-quantized, by row",
        "dequantized",
        quantized(compressed_config("float-quantized", FLOAT8), compressed("float-quantized", FLOAT8)),
    ),
    Case(
        "FP8 in blocks",
        "one scale for 64 by 32 weights",
        "dequantized",
        quantized(fp8_config((64, 32)), fp8((64, 32))),
    ),
    Case("bitsandbytes, NF4", "NF4 with nested scales", "dequantized", bitsandbytes("nf4, double")),
    Case("bitsandbytes, INT8", "LLM.int8()", "dequantized", bitsandbytes("int8")),
    Case(
        "scales missing",
        "a GPTQ checkpoint without the scales of one matrix kind",
        "refused",
        quantized(gptq_config(), gptq(), losing("down_proj.scales")),
    ),
    Case(
        "FP8, scales missing",
        "FP8 in blocks without some scales",
        "refused",
        quantized(fp8_config((64, 32)), fp8((64, 32)), losing("q_proj.weight_scale_inv")),
    ),
    Case(
        "wrong group size",
        "config.json says groups of 64, the file holds groups of 32",
        "refused",
        quantized(gptq_config(group_size=64), gptq()),
    ),
    Case(
        "no quantization config",
        "GPTQ tensors, and nothing that says how",
        "refused",
        quantized(None, gptq()),
    ),
    Case(
        "floats under a config",
        "config.json says GPTQ, the file holds floats",
        "refused",
        floats_under_a_config,
    ),
    Case(
        "another method",
        "quantized by HQQ",
        "refused",
        quantized({"quant_method": "hqq", "nbits": 4}, gptq()),
    ),
    Case(
        "marlin",
        "GPTQ in the layout of a kernel",
        "refused",
        quantized(gptq_config(checkpoint_format="marlin"), gptq()),
    ),
)
