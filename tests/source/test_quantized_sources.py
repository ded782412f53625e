"""Quantized checkpoints are read as transformers' model with the values that their codes stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from checkpoint_files import edit_config
from compressed import floats
from compressed_models import arguments, compressed, compressed_config
from made_recipes import made_recipe
from quantized_models import (
    AWQ_CONFIG,
    BITSANDBYTES,
    Quantizer,
    awq,
    bit_stream,
    bitnet,
    change_tensors,
    fp8,
    fp8_config,
    gptq,
    gptq_config,
    random_codes,
    save_bitsandbytes,
    save_quantized,
    small,
    without,
)
from tiny_models import transformers_own
from torch import Tensor
from transformers import (
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    PreTrainedModel,
)

from rk_export import compress, export
from rk_export.errors import InputError
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.quantization import QuantSpec
from rk_export.options.run import Run
from rk_export.report.records import Report
from rk_export.runtime import Session
from rk_export.source.quantized.tensors import dequantized
from rk_export.source.stored import open_source, read_config
from rk_export.source.weight_files import open_tensors

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
IDS = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(1))


def check_equal(folder: Path, reference: PreTrainedModel) -> None:
    """Compare the logits of a source with transformers'."""
    loaded = open_source(folder).load()
    with torch.no_grad():
        expected, logits = reference(IDS).logits.float(), loaded(IDS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "act_order"),
    [
        (2, 32, False, False),
        (3, 64, False, False),
        (3, -1, True, False),
        (4, 32, False, False),
        (4, 64, True, True),
        (4, 128, False, True),
        (4, -1, True, False),
        (8, 32, True, False),
        (8, -1, False, False),
    ],
)
def test_gptq(tmp_path: Path, bits: int, size: int, symmetric: bool, act_order: bool, version: int) -> None:
    quantize = gptq(version, bits=bits, size=size, symmetric=symmetric, act_order=act_order)
    form = "gptq" if version == 1 else "gptq_v2"
    config = gptq_config(
        bits=bits, group_size=size, desc_act=act_order, sym=symmetric, checkpoint_format=form
    )
    check_equal(tmp_path, save_quantized(small(), tmp_path, config, quantize))


def test_gptq_zero_points_of_zero_borrow_from_their_neighbours(tmp_path: Path) -> None:
    """GPTQModel makes the first version of the layout by subtracting from whole words."""

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, _ = gptq(version=2)(name, matrix)
        codes = random_codes(*matrix.shape, seed=len(name))
        codes.zeros[:, ::3] = 0
        rows = torch.tensor([bit_stream(row, 4) for row in codes.zeros], dtype=torch.int32)
        return {**parts, "qzeros": rows - 0x11111111}, codes.dense()

    check_equal(tmp_path, save_quantized(small(), tmp_path, gptq_config(), quantize))


def test_gptq_modules_with_rules_of_their_own(tmp_path: Path) -> None:
    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return gptq(bits=8, size=64)(name, matrix) if "down" in name else gptq()(name, matrix)

    config = gptq_config(dynamic={r"+:.*\.down_proj": {"bits": 8, "group_size": 64}})
    check_equal(tmp_path, save_quantized(small(), tmp_path, config, quantize))
    edit_config(tmp_path, quantization_config=gptq_config())
    with pytest.raises(InputError, match=r"down_proj.qzeros.* 8 bits a code, the config says 4"):
        open_source(tmp_path)


def test_gptq_of_transposed_modules_and_of_joined_ones(tmp_path: Path) -> None:
    for family in ("gpt2", "phi3"):
        folder = tmp_path / family
        check_equal(folder, save_quantized(small(family), folder, gptq_config(), gptq()))


def test_an_output_projection_may_be_quantized(tmp_path: Path) -> None:
    reference = save_quantized(small(vocab_size=192), tmp_path, gptq_config(lm_head=True), gptq())
    parts, dense = gptq()("lm_head", reference.lm_head.weight.detach())

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{leaf}": tensor for leaf, tensor in parts.items()}

    change_tensors(tmp_path, change)
    reference.lm_head.weight.data = dense
    check_equal(tmp_path, reference)


@pytest.mark.parametrize(
    ("name", "config", "quantize"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 32, "desc_act": false}', gptq()),
        ("quant_config.json", '{"w_bit": 4, "q_group_size": 32, "version": "GEMM"}', awq),
    ],
)
def test_configs_beside_the_weights(tmp_path: Path, name: str, config: str, quantize: Quantizer) -> None:
    reference = save_quantized(small(), tmp_path, None, quantize)
    with pytest.raises(InputError, match="no quantization_config in config"):
        open_source(tmp_path)
    (tmp_path / name).write_text(config)
    if quantize is not awq:
        (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    check_equal(tmp_path, reference)


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    save_quantized(small(), tmp_path, gptq_config(), gptq())
    down, up = (f"model.layers.0.mlp.{name}_proj.bias" for name in ("down", "up"))
    change_tensors(tmp_path, lambda tensors: tensors.update({down: torch.zeros(128), up: torch.ones(128)}))
    config = read_config(tmp_path)
    without = dequantized(open_tensors(tmp_path), config, lambda name: not name.endswith(".bias"))
    assert up in without.shapes  # it adds something: to be refused as a tensor without a place
    assert down not in without.shapes
    assert down in dequantized(open_tensors(tmp_path), config).shapes


@pytest.mark.parametrize("stated", ["gptq", [1], 4, {}])
def test_a_malformed_quantization_config_is_refused(tmp_path: Path, stated: Any) -> None:
    save_quantized(small(), tmp_path, None, gptq())
    edit_config(tmp_path, quantization_config=stated)
    with pytest.raises(InputError, match=r"config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize("version", ["gemm", "exllama"])
def test_awq(tmp_path: Path, version: str) -> None:
    check_equal(tmp_path, save_quantized(small(), tmp_path, {**AWQ_CONFIG, "version": version}, awq))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_quantized_experts(tmp_path: Path, family: str) -> None:
    fields = {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    check_equal(tmp_path, save_quantized(small(family, **fields), tmp_path, AWQ_CONFIG, awq))


@pytest.mark.parametrize(
    ("form", "bits", "strategy", "symmetric"),
    [
        *(("pack-quantized", bits, "group", False) for bits in (2, 3, 4, 5, 8)),
        ("pack-quantized", 4, "group", True),
        ("pack-quantized", 4, "channel", True),
        ("pack-quantized", 4, "channel", False),
        ("pack-quantized", 4, "tensor", True),
        ("int-quantized", 8, "channel", True),
        ("int-quantized", 8, "group", False),
        ("int-quantized", 8, "tensor", False),
        ("int-quantized", 8, "block", True),
        ("naive-quantized", 8, "channel", True),
        *(("float-quantized", 8, strategy, True) for strategy in ("tensor", "channel", "group", "block")),
    ],
)
def test_compressed_tensors(tmp_path: Path, form: str, bits: int, strategy: str, symmetric: bool) -> None:
    kind = "float" if form == "float-quantized" else "int"
    weights = arguments(bits, strategy, symmetric=symmetric, kind=kind)
    config = compressed_config(form, weights)
    check_equal(
        tmp_path, save_quantized(small(), tmp_path, config, compressed(form, weights, torch.bfloat16))
    )


def test_compressed_tensors_with_groups_of_different_formats(tmp_path: Path) -> None:
    four, eight = arguments(4, "group", symmetric=True), arguments(8, "channel", symmetric=True)

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        form, weights = ("int-quantized", eight) if "down" in name else ("pack-quantized", four)
        return compressed(form, weights)(name, matrix)

    config = compressed_config("mixed-precision", four, eight)
    check_equal(tmp_path, save_quantized(small(), tmp_path, config, quantize))


def test_compressed_tensors_with_act_order(tmp_path: Path) -> None:
    """The group of every column is stored, as releases before 0.13 of the package did."""
    order = torch.randperm(128, generator=torch.Generator().manual_seed(2))
    weights = arguments(4, "group", symmetric=False)

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = order if matrix.shape[1] == 128 else torch.arange(matrix.shape[1])
        groups = torch.empty(len(columns), dtype=torch.int32)
        groups[columns] = (torch.arange(len(columns)) // 32).to(torch.int32)
        parts, dense = compressed("pack-quantized", weights)(name, matrix[:, columns])
        codes = compressed_codes(parts["weight_packed"], matrix.shape)
        codes[:, columns] = codes.clone()
        packed = torch.tensor([bit_stream(row, 4) for row in codes], dtype=torch.int32)
        placed = torch.empty_like(dense)
        placed[:, columns] = dense
        return {**parts, "weight_packed": packed, "weight_g_idx": groups}, placed

    config = compressed_config("pack-quantized", weights)
    check_equal(tmp_path, save_quantized(small(), tmp_path, config, quantize))


def compressed_codes(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return 4-bit codes, one by one."""
    words = packed.tolist()
    return torch.tensor(
        [[(words[row][at // 8] >> (4 * (at % 8))) & 15 for at in range(shape[1])] for row in range(shape[0])]
    )


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (48, 40), None])
def test_fp8(tmp_path: Path, block: tuple[int, int] | None) -> None:
    check_equal(tmp_path, save_quantized(small(), tmp_path, fp8_config(block), fp8(block)))


BITNET = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}


@pytest.mark.parametrize("family", ["bitnet", "llama"])
@pytest.mark.parametrize("multiplies", [True, False])
def test_bitnet(tmp_path: Path, family: str, multiplies: bool) -> None:
    config = {**BITNET, "linear_class": "autobitlinear" if multiplies else "bitlinear"}
    reference = save_quantized(small(family), tmp_path, config, bitnet(multiplies=multiplies))
    check_equal(tmp_path, reference)


def test_bitnet_master_weights_are_rounded_as_their_linear_modules_do(tmp_path: Path) -> None:
    config = {**BITNET, "linear_class": "autobitlinear", "quantization_mode": "online"}
    rounded = bitnet()

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"weight": matrix}, rounded(name, matrix)[1]

    check_equal(tmp_path, save_quantized(small("bitnet"), tmp_path, config, quantize))


def test_bitnet_with_norms_in_its_linear_modules_is_refused(tmp_path: Path) -> None:
    save_quantized(small("bitnet"), tmp_path, {**BITNET, "use_rms_norm": True}, bitnet())
    with pytest.raises(InputError, match="use_rms_norm"):
        open_source(tmp_path)


@pytest.mark.whole
def test_bitnet_codes_are_carried_in_two_bits(tmp_path: Path) -> None:
    reference = save_quantized(small("bitnet"), tmp_path / "model", BITNET, bitnet())
    recipe = floats(quant=QuantSpec(4, 32), quantizer="carry")
    compress(tmp_path / "model", tmp_path / "out", recipe, run=Run(threads=1))
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    bits = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"]
    assert bits.count(2) == 4  # q, k and v are one product, gate and up another, o and down
    logits = Session.from_pretrained(tmp_path / "out", threads=1).prefill_logits(IDS.numpy())
    with torch.no_grad():
        expected = reference(IDS).logits.numpy()
    assert abs(logits - expected).max() / abs(expected).max() < 1e-5


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized", "float-quantized"])
def test_compressed_tensors_as_transformers_decompresses_them(tmp_path: Path, form: str) -> None:
    kind = "float" if form == "float-quantized" else "int"
    weights = arguments(4 if form == "pack-quantized" else 8, "channel", symmetric=True, kind=kind)
    save_quantized(small(), tmp_path, compressed_config(form, weights), compressed(form, weights))
    check_equal(
        tmp_path,
        transformers_own(tmp_path, quantization_config=CompressedTensorsConfig(run_compressed=False)),
    )


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_fp8_as_transformers_dequantizes_it(tmp_path: Path, block: tuple[int, int]) -> None:
    save_quantized(small(), tmp_path, fp8_config(block), fp8(block))
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    check_equal(tmp_path, transformers_own(tmp_path, quantization_config=config))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", BITSANDBYTES.values(), ids=BITSANDBYTES.keys())
def test_bitsandbytes_as_transformers_dequantizes_it(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    folder = save_bitsandbytes(tmp_path, family, fields)
    check_equal(folder, transformers_own(folder).dequantize())


def test_bitsandbytes_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_bitsandbytes(tmp_path, "llama", BITSANDBYTES["fp4"])
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InputError, match="install bitsandbytes"):
        open_source(folder)


def replaced(suffix: str, by: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(suffix)]:
            tensors[name] = by(tensors[name])

    return change


PACK = compressed_config("pack-quantized", arguments(4, "group", symmetric=False))
PACKED = compressed("pack-quantized", arguments(4, "group", symmetric=False))
INT8 = compressed_config("int-quantized", arguments(8, "channel", symmetric=True))
INT8_CODES = compressed("int-quantized", arguments(8, "channel", symmetric=True))


@pytest.mark.parametrize(
    ("config", "quantize", "change", "message"),
    [
        (gptq_config(), gptq(), without("down_proj.scales"), r"mlp.down_proj.scales' is missing"),
        (gptq_config(), gptq(), without("q_proj.qzeros"), r"q_proj.qzeros' is missing"),
        (gptq_config(), gptq(), without("q_proj.qweight"), r"q_proj.qweight' is missing"),
        (gptq_config(desc_act=True), gptq(), without("none"), r"down_proj.g_idx' is missing"),
        (
            gptq_config(desc_act=True),
            gptq(act_order=True),
            replaced("g_idx", lambda index: index + 1),
            "it names group",
        ),
        (
            gptq_config(),
            gptq(act_order=True),
            replaced("g_idx", lambda index: index[:-1]),
            r"\[127\], \[128\]",
        ),
        (gptq_config(), gptq(), replaced("scales", lambda scales: scales[:-1]), "qzeros.* it has shape"),
        (
            gptq_config(group_size=64),
            gptq(),
            without("none"),
            "it has 4 groups, the config's groups of 64 make 2",
        ),
        (gptq_config(), gptq(), replaced("qweight", lambda words: words.float()), "int32 was expected"),
        (
            gptq_config(),
            gptq(),
            replaced("qzeros", lambda zeros: zeros[:, :-1]),
            "qweight, qzeros and scales have",
        ),
        (gptq_config(bits="four"), gptq(), without("none"), "bits is 'four'"),
        (gptq_config(checkpoint_format="marlin"), gptq(), without("none"), "layout 'marlin'"),
        (AWQ_CONFIG, awq, without("qzeros"), r"qzeros' is missing"),
        ({**AWQ_CONFIG, "version": "gemv"}, awq, without("none"), "layout 'gemv'"),
        ({**AWQ_CONFIG, "group_size": 64}, awq, without("none"), "was expected"),
        (PACK, PACKED, without("weight_scale"), r"weight_scale' is missing"),
        (PACK, PACKED, without("weight_zero_point"), r"weight_zero_point' is missing"),
        (PACK, PACKED, without("weight_shape"), r"weight_shape' is missing"),
        (PACK, PACKED, without("weight_packed"), r"proj.weight' is missing"),
        (PACK, PACKED, replaced("weight_packed", lambda words: words[:, :-1]), "does not hold"),
        (PACK, PACKED, replaced("weight_scale", lambda scales: scales[:, :-1]), "does not make groups"),
        (INT8, INT8_CODES, without("weight_scale"), "not one tensor is stored so"),
        (INT8, INT8_CODES, replaced("proj.weight", lambda codes: codes.float()), "rounded when it runs"),
        (
            {**PACK, "format": "nvfp4-pack-quantized"},
            PACKED,
            without("none"),
            "'nvfp4-pack-quantized' is not read",
        ),
        ({**PACK, "sparsity_config": {"format": "sparse-24-bitmask"}}, PACKED, without("none"), "sparse-24"),
        ({**PACK, "transform_config": {"config_groups": {"R1": {}}}}, PACKED, without("none"), "rotates"),
        (
            fp8_config((64, 32)),
            fp8((64, 32)),
            without("q_proj.weight_scale_inv"),
            "q_proj.weight_scale_inv and",
        ),
        (fp8_config((64, 32)), fp8((64, 32)), without("q_proj.weight"), r"q_proj.weight' is missing"),
        (
            fp8_config((64, 32)),
            fp8((64, 32)),
            replaced("_inv", lambda scales: scales[:, :-1]),
            "its shape is",
        ),
        (
            gptq_config(desc_act=True),
            gptq(act_order=True),
            replaced("g_idx", torch.zeros_like),
            "in spite of act",
        ),
        (gptq_config(), gptq(), replaced("q_proj.scales", lambda scales: scales[0]), "two dimensions"),
        (
            {"quant_method": "compressed-tensors", "config_groups": [1]},
            PACKED,
            without("none"),
            "cannot be read",
        ),
        (
            {**PACK, "config_groups": {"a": {"weights": {"num_bits": "x"}}}},
            PACKED,
            without("none"),
            "cannot be read",
        ),
        ({"bits": 4}, gptq(), without("none"), "no method that is named"),
        ({"quant_method": "hqq", "nbits": 4}, gptq(), without("none"), "quantized by hqq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, gptq(), without("none"), r"modelopt \(NVFP4\)"),
        (AWQ_CONFIG, fp8(None), without("none"), "not one tensor is stored so"),
        (fp8_config(None), gptq(), without("none"), "not one tensor is stored so"),
    ],
)
def test_what_does_not_fit_is_refused_on_opening(
    tmp_path: Path,
    config: dict[str, Any],
    quantize: Quantizer,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    save_quantized(small(), tmp_path, config, quantize)
    change_tensors(tmp_path, change)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("suffix", ["absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"])
def test_bitsandbytes_without_a_part(tmp_path: Path, suffix: str) -> None:
    folder = save_bitsandbytes(tmp_path, "llama", BITSANDBYTES["nf4, double"])
    change_tensors(folder, without(f"q_proj.weight.{suffix}"))
    with pytest.raises(InputError, match=r"q_proj\.weight.*missing|scales of '.*q_proj\.weight' are missing"):
        open_source(folder)


def test_floats_under_a_quantization_config_are_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=gptq_config())
    with pytest.raises(InputError, match="remove quantization_config"):
        open_source(tmp_path)


def test_what_runs_quantized_in_the_original_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**INT8, "kv_cache_scheme": {"num_bits": 8}}
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    reference = save_quantized(small(), tmp_path, config, INT8_CODES)
    change_tensors(
        tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.ones(1)})
    )
    check_equal(tmp_path, reference)
    assert "7 matrices are dequantized to float32" in caplog.text
    assert "activations, which the original rounds" in caplog.text
    assert "the cache, which the original rounds" in caplog.text


@pytest.mark.whole
def test_a_quantized_source_is_exported_and_compressed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = save_quantized(small(), tmp_path / "model", gptq_config(), gptq())
    export(tmp_path / "model", tmp_path / "floats", run=Run(threads=1))
    compress(
        tmp_path / "model",
        tmp_path / "int4",
        made_recipe(calibration=CalibrationOptions(tokens=512)),
        run=Run(threads=1),
    )
    assert caplog.text.count("GPTQ (4 bits, groups of 32): 7 matrices are dequantized") == 2
    for name in ("floats", "int4"):
        report = Report.load(tmp_path / name / "report.json")
        assert [item.details["pass"] for item in report.findings if item.target == "quantized source"] == [
            "dequantize"
        ]
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
    logits = Session.from_pretrained(tmp_path / "floats", threads=1).prefill_logits(IDS.numpy())
    with torch.no_grad():
        expected = reference(IDS).logits.numpy()
    assert abs(logits - expected).max() / abs(expected).max() < 1e-5
