"""with: carry. The codes in the graph are those of the checkpoint, and so are the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compressed_models import arguments, compressed, compressed_config
from conftest import Cli
from made_recipes import made_recipe
from onnx import numpy_helper
from quantized_models import (
    AWQ_CONFIG,
    Codes,
    Quantizer,
    awq,
    change_tensors,
    fp8,
    fp8_config,
    gptq,
    gptq_config,
    random_codes,
    save_quantized,
)
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from rk_export import compress, export, make_plan, verify
from rk_export.errors import InputError
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.quantization import QuantSpec
from rk_export.options.run import Run
from rk_export.plan import Plan
from rk_export.report.records import Outcome, Report
from rk_export.runtime import Session

IDS = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {
    "table": None,
    "calibration": UNWEIGHED,
    "quantizer": "carry",
}


def small(family: str = "llama", **fields: Any) -> PreTrainedModel:
    return tiny_model(family, **{"num_hidden_layers": 1, "hidden_size": 128, **fields})


def bundle_error(folder: Path, reference: PreTrainedModel) -> float:
    """Return the largest difference of logits at accuracy level 0 over the largest logit."""
    session = Session.from_pretrained(folder, threads=1, accuracy_level=0)
    with torch.no_grad():
        expected = reference(IDS).logits.numpy()
    return float(abs(session.prefill_logits(IDS.numpy()) - expected).max() / abs(expected).max())


def graph_codes(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Return codes (out, in), scales and zero points (out, blocks) of every MatMulNBits by its weight's name."""
    graph = onnx.load(folder / "model.onnx").graph
    arrays = {item.name: item for item in graph.initializer}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    found = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        values = {attribute.name: attribute.i for attribute in node.attribute}
        codes, scales = (numpy_helper.to_array(arrays[casts.get(name, name)]) for name in node.input[1:3])
        rows, blocks, bits = codes.shape[0], codes.shape[1], values["bits"]
        lanes = np.stack([codes >> (bits * lane) & (2**bits - 1) for lane in range(8 // bits)], axis=-1)
        zeros = None
        if len(node.input) > 3 and node.input[3]:
            packed = numpy_helper.to_array(arrays[node.input[3]]).reshape(rows, -1)
            wide = np.stack([packed >> (bits * lane) & (2**bits - 1) for lane in range(8 // bits)], axis=-1)
            zeros = wide.reshape(rows, -1)[:, :blocks]
        found[node.input[1]] = (lanes.reshape(rows, -1)[:, : values["K"]], scales.reshape(rows, -1), zeros)
    return found


def recording(codes: dict[str, Codes], **grid: Any) -> Quantizer:
    """Return a GPTQ quantizer that keeps what it made."""

    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes[name] = random_codes(*matrix.shape, seed=len(name), **grid)
        return gptq(**grid)(name, matrix)

    return quantize


# What one operator computes in the graph: projections of one input stand in one matrix, row upon row.
TOGETHER = {
    "q_k_v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("bits", "size", "symmetric"),
    [(4, 32, True), (4, -1, False), (8, 64, False)],
)
def test_codes_scales_and_zero_points_in_the_graph_are_the_checkpoints(
    tmp_path: Path, bits: int, size: int, symmetric: bool
) -> None:
    made: dict[str, Codes] = {}
    quantize = recording(made, bits=bits, size=size, symmetric=symmetric)
    config = gptq_config(bits=bits, group_size=size)
    reference = save_quantized(small(), tmp_path / "model", config, quantize)
    compress(tmp_path / "model", tmp_path / "bundle", made_recipe(**OPTIONS), run=Run(threads=1))
    stored = graph_codes(tmp_path / "bundle")
    assert len(stored) == len(TOGETHER)
    for part, names in TOGETHER.items():
        values, scales, zeros = next(arrays for name, arrays in stored.items() if part in name)
        rows = [made[f"model.layers.0.{name}"] for name in names]
        np.testing.assert_array_equal(values, torch.cat([one.codes.T for one in rows]).numpy())
        expected = torch.cat([one.scales.T for one in rows]).numpy()
        repeats = scales.shape[1] // expected.shape[1]
        assert scales.dtype == np.float16
        np.testing.assert_array_equal(scales, np.repeat(expected, repeats, axis=1))
        assert (zeros is None) == symmetric
        if zeros is not None:
            expected = torch.cat([one.zeros.T for one in rows]).numpy()
            np.testing.assert_array_equal(zeros, np.repeat(expected, repeats, axis=1))
    assert bundle_error(tmp_path / "bundle", reference) < 1e-5


PACKED = arguments(4, "channel", symmetric=True)
INT8 = arguments(8, "channel", symmetric=True)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("family", "config", "quantize"),
    [
        ("llama", AWQ_CONFIG, awq),
        ("phi3", gptq_config(), gptq()),
        ("gpt2", gptq_config(), gptq()),
        ("mixtral", AWQ_CONFIG, awq),
        ("llama", compressed_config("pack-quantized", PACKED), compressed("pack-quantized", PACKED)),
        ("llama", compressed_config("int-quantized", INT8), compressed("int-quantized", INT8)),
    ],
)
def test_every_matrix_is_carried_over(
    tmp_path: Path, family: str, config: dict[str, Any], quantize: Quantizer
) -> None:
    reference = save_quantized(small(family), tmp_path / "model", config, quantize)
    report = compress(tmp_path / "model", tmp_path / "bundle", made_recipe(**OPTIONS), run=Run(threads=1))
    sites = Plan.load(tmp_path / "bundle" / "plan.json").sites
    assert all(site.carried for site in sites)
    assert {site.site for site in sites} == {
        finding.target for finding in report.findings if (finding.details or {}).get("pass") == "carry"
    }
    assert bundle_error(tmp_path / "bundle", reference) < 1e-5
    tiers = {tier.tier: tier for tier in verify(tmp_path / "bundle", tmp_path / "model", run=Run(threads=1))}
    assert tiers["b"].max_error == 0
    assert all(tier.passed is not False for tier in tiers.values())


@pytest.mark.whole
def test_what_cannot_be_carried_is_quantized_anew_and_said(tmp_path: Path) -> None:
    def quantize(name: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return gptq(act_order="down" in name, symmetric=True)(name, matrix)

    save_quantized(small(), tmp_path / "model", gptq_config(), quantize)
    options = made_recipe(**{**OPTIONS, "quant": QuantSpec(8, 64)})
    report = compress(tmp_path / "model", tmp_path / "bundle", options, run=Run(threads=1))
    plan = Plan.load(tmp_path / "bundle" / "plan.json")
    assert {site.site: site.quant for site in plan.sites if not site.carried} == {
        "layers.0.down": QuantSpec(8, 64)
    }
    skipped = [item for item in report.findings if item.outcome is Outcome.SKIPPED and "down" in item.target]
    assert [item.reason for item in skipped] == [
        "not carried over, is quantized anew: mlp.down_proj: the groups' columns do not lie side by side (act order): "
        "MatMulNBits has no group index"
    ]


@pytest.mark.whole
def test_a_checkpoint_of_carried_codes_exports_the_same(tmp_path: Path) -> None:
    reference = save_quantized(small(), tmp_path / "model", gptq_config(), gptq())
    options = made_recipe(**OPTIONS)
    compress(
        tmp_path / "model", tmp_path / "one", options, checkpoint=tmp_path / "checkpoint", run=Run(threads=1)
    )
    export(tmp_path / "checkpoint", tmp_path / "two", run=Run(threads=1))
    assert bundle_error(tmp_path / "two", reference) < 1e-5


def test_a_plan_of_carried_codes_needs_the_quantized_checkpoint(tmp_path: Path) -> None:
    reference = save_quantized(small(), tmp_path / "model", gptq_config(), gptq())
    plan = make_plan(tmp_path / "model", made_recipe(**OPTIONS))
    assert Plan.from_json(plan.to_json()) == plan
    reference.save_pretrained(tmp_path / "floats")
    with pytest.raises(InputError, match="not on integer grids"):
        compress(tmp_path / "floats", tmp_path / "bundle", plan=plan, run=Run(threads=1))


@pytest.mark.whole
def test_an_output_projection_on_a_grid_is_said_to_lose_its_codes(tmp_path: Path) -> None:
    reference = save_quantized(small(vocab_size=192), tmp_path / "model", gptq_config(), gptq())
    parts, _ = gptq()("lm_head", reference.lm_head.weight.detach())

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{leaf}": tensor for leaf, tensor in parts.items()}

    change_tensors(tmp_path / "model", change)
    report = compress(tmp_path / "model", tmp_path / "bundle", made_recipe(**OPTIONS), run=Run(threads=1))
    reasons = [item.reason for item in report.findings if item.target == "lm_head"]
    assert reasons == ["its codes are not carried over: it is stored in the format of the embedding"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there are no codes to carry over: the model is stored in floats"),
        (("--keep", "0.9"), "codes that are carried over cannot be changed"),
        (("--size", "1MB"), "which factorize does"),
        (("--set", "factorize.keep=0.9"), "which factorize does"),
        (("--set", "heal.steps=3"), "which heal does"),
        (("--set", "prepare=[fold]"), "which prepare does"),
        (("--set", "prune.ffn_keep=0.5"), "which prune does"),
        (("--set", "correct.rank=4"), "which correct does"),
        (("--set", "budget.mean_bits=4.5"), "which a budget does"),
    ],
)
def test_refused_on_the_command_line(
    llama: Path, tmp_path: Path, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    ended = cli("compress", llama, "-o", tmp_path / "bundle", "--recipe", "carry", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "bundle").exists()


def test_unknown_choice(llama: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli("plan", llama, "-o", tmp_path / "plan.json", "--set", "quantize.with=copy")
    assert ended.code == 2
    assert "quantize.with" in ended.err


def test_fp8_has_no_codes(tmp_path: Path, cli: Cli) -> None:
    save_quantized(small(), tmp_path / "model", fp8_config(None), fp8(None))
    ended = cli("compress", tmp_path / "model", "-o", tmp_path / "bundle", "--recipe", "carry")
    assert ended.code == 2
    assert "the model is stored as FP8 with scales" in ended.err


@pytest.mark.whole
def test_the_command_line_carries_codes_over(tmp_path: Path, cli: Cli) -> None:
    save_quantized(small(), tmp_path / "model", gptq_config(), gptq())
    ended = cli(
        "compress", tmp_path / "model", "-o", tmp_path / "bundle",
        "--recipe", "carry", "--set", "calibration.text=none", "--device", "cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = Report.load(tmp_path / "bundle" / "report.json")
    assert sum((item.details or {}).get("pass") == "carry" for item in report.findings) == 7
