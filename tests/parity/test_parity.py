"""Every tier of the parity contract can fail, and fails for the fault that it is there for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import tiny_options
from onnx import helper, numpy_helper
from tiny_models import tiny_model

import rk_export
from rk_export import assert_parity
from rk_export.bundle import write as write_bundle
from rk_export.errors import InputError, ParityError
from rk_export.graph.build import save_graph
from rk_export.json_codec import from_json
from rk_export.manifest import check_manifest
from rk_export.options.run import Run
from rk_export.parity import comparison
from rk_export.parity import tiers as parity
from rk_export.parity.comparison import compare, require_parity
from rk_export.parity.greedy import Golden
from rk_export.parity.preflight import preflight
from rk_export.parity.probe import Probe, make_probe
from rk_export.parity.tiers import method_tiers, runtime_tiers
from rk_export.plan import Plan
from rk_export.planning.planner import decide_plan
from rk_export.report.records import ParityTier
from rk_export.rewrite.apply import Rewritten, rewrite
from rk_export.runtime import Session
from rk_export.source.stored import open_source

Damage = Callable[[onnx.ModelProto], None]


# --- comparing


def test_compare_by_hand() -> None:
    reference = np.log(np.array([[[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]]))  # (1, 2, 3)
    candidate = (
        np.log(np.array([[[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]])) + 3.0
    )  # a shift changes no probability
    tier = compare("c", "by hand", reference, candidate, bound=10.0, note="two positions")
    assert tier.max_error == pytest.approx(3.0 + math.log(2))
    assert tier.scale == pytest.approx(-math.log(0.1))
    assert tier.kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)
    assert tier.top1_agreement == 0.5
    assert (tier.tier, tier.name, tier.bound, tier.note) == ("c", "by hand", 10.0, "two positions")


@pytest.mark.parametrize(
    ("error", "bound", "passed"),
    [
        (0.25, 0.125, True),
        (0.25, 0.12, False),
        (0.0, 0.0, True),
        (9.0, None, None),
        (math.nan, 10.0, False),
        (math.inf, 10.0, False),
    ],
)
def test_verdict(error: float, bound: float | None, passed: bool | None) -> None:
    reference = np.array([[[-2.0, 1.0]]])
    with np.errstate(invalid="ignore"):
        tier = compare("c", "", reference, reference + np.array([0.0, error]), bound=bound)
    assert tier.passed is passed


def test_half_floats_are_compared_in_full_precision() -> None:
    reference = np.full((1, 1, 2), 60000.0, np.float16)
    tier = compare("c", "", reference, -reference, bound=1.0)
    assert tier.max_error == 120000.0


def test_logits_are_compared_some_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    reference, candidate = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    whole = compare("c", "", reference, candidate, bound=1.0)
    monkeypatch.setattr(comparison, "_TOGETHER", 2 * 7)
    parts = compare("c", "", reference, candidate, bound=1.0)
    assert parts.kl == pytest.approx(whole.kl)
    assert replace(parts, kl=whole.kl) == whole
    assert comparison.relative_error(reference, candidate) == whole.relative_error
    candidate[1, 2, 3] = np.nan
    assert math.isnan(compare("c", "", reference, candidate, bound=1.0).max_error)
    assert math.isnan(comparison.relative_error(reference, candidate))


# --- the method's own error


def test_method_tiers_tell_factorization_and_quantization_apart(llama: Path) -> None:
    source = open_source(llama)
    before = preflight(source, tiny_options())

    def errors(**changes: object) -> list[float]:
        plan = decide_plan(source, tiny_options(**changes))
        rewritten = rewrite(source, plan, probe=torch.from_numpy(before.probe.batch))
        tiers = list(method_tiers(rewritten, before))
        assert [(tier.tier, tier.passed) for tier in tiers] == [
            ("0", True),
            ("p", True),
            ("a", None),
            ("b", None),
        ]
        return [tier.max_error for tier in tiers[2:]]

    factorized, quantized = errors(quant=None, table=None)
    assert factorized > 0
    assert quantized == 0
    factorized, quantized = errors(groups=())
    assert factorized == 0
    assert quantized > 0


# --- faults in a bundle


@pytest.fixture(scope="module")
def probe(llama: Path) -> Probe:
    return make_probe(llama, open_source(llama).config.vocab_size)


@pytest.fixture(scope="module")
def rewritten(llama: Path, bundle: Path, probe: Probe) -> Rewritten:
    """The PyTorch model that the tiny bundle was exported from."""
    plan = Plan.load(bundle / "plan.json")
    return rewrite(open_source(llama), plan, probe=torch.from_numpy(probe.batch))


def failed_tiers(bundle: Path, rewritten: Rewritten, probe: Probe) -> str:
    tiers, _ = runtime_tiers(bundle, rewritten, probe, provider="cpu", threads=1)
    assert [tier.tier for tier in tiers] == list("cdefghi")
    return "".join(tier.tier for tier in tiers if tier.passed is False)


def damage(bundle: Path, change: Damage) -> None:
    model = onnx.load(bundle / "model.onnx")
    change(model)
    (bundle / "model.onnx.data").unlink()
    onnx.save(
        model,
        bundle / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def wrong_scale(model: onnx.ModelProto) -> None:
    """Halve the scales of one quantized matrix."""
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    cast = next(other for other in model.graph.node if node.input[2] in other.output)
    tensor = initializer(model, cast.input[0])
    halved = numpy_helper.to_array(tensor) / 2
    tensor.CopyFrom(numpy_helper.from_array(halved.astype(np.float16), tensor.name))


def outlier_channel(model: onnx.ModelProto) -> None:
    """Let an input channel that the head ignores drown the others, which int8 then rounds to nothing."""
    codes = initializer(model, "lm_head.codes")  # 8 bits: (rows, blocks, columns of a block)
    zeroed = numpy_helper.to_array(codes).copy()
    zeroed[:, :, 0] = 128
    codes.CopyFrom(numpy_helper.from_array(zeroed, codes.name))
    gains = initializer(model, "model.norm.weight")
    loud = numpy_helper.to_array(gains).copy()
    loud[::32] = 1e4
    gains.CopyFrom(numpy_helper.from_array(loud, gains.name))


def wrong_cache(model: onnx.ModelProto) -> None:
    """Hand out keys that are half as long as those that were computed."""
    node = next(node for node in model.graph.node if "present.0.key" in node.output)
    node.output[list(node.output).index("present.0.key")] = "whole_key"
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    model.graph.initializer.append(half)
    model.graph.node.append(helper.make_node("Mul", ["whole_key", "half"], ["present.0.key"]))


def no_mask(model: onnx.ModelProto) -> None:
    """Take the attention bias, which carries the mask, away from every attention."""
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert all(len(node.input) > 10 and node.input[10] for node in nodes)
    for node in nodes:
        node.input[10] = ""


@pytest.mark.whole
def test_the_undamaged_bundle_passes(own_bundle: Path, rewritten: Rewritten, probe: Probe) -> None:
    damage(own_bundle, lambda model: None)
    assert failed_tiers(own_bundle, rewritten, probe) == ""


@pytest.mark.whole
@pytest.mark.parametrize(
    ("change", "failed"),
    [(wrong_scale, "cg"), (outlier_channel, "cdg"), (wrong_cache, "eg"), (no_mask, "f")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_shows_in_its_tier(
    own_bundle: Path, rewritten: Rewritten, probe: Probe, change: Damage, failed: str
) -> None:
    damage(own_bundle, change)
    assert failed_tiers(own_bundle, rewritten, probe) == failed


@pytest.mark.whole
def test_int8_inputs_may_cost_what_pytorch_says_that_they_cost(tmp_path: Path) -> None:
    """One neuron a thousand times as loud: its block of inputs is coarse, in the runtime as in the emulation."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3] *= 1000
    model.save_pretrained(tmp_path / "model")
    report = rk_export.compress(
        tmp_path / "model", tmp_path / "out", tiny_options(groups=()), run=Run(threads=1)
    )
    (tier,) = (tier for tier in report.parity if tier.tier == "d")
    emulated = float(tier.note.removeprefix("PyTorch's own int8 inputs differ from floats by ").split(";")[0])
    assert tier.bound == pytest.approx(2 * emulated, rel=0.05)
    assert tier.relative_error == pytest.approx(emulated, rel=0.2)
    exact = tiny_options(groups=(), accuracy_level=0)
    report = rk_export.compress(tmp_path / "model", tmp_path / "exact", exact, run=Run(threads=1))
    (tier,) = (tier for tier in report.parity if tier.tier == "d")
    assert (tier.max_error, tier.bound, tier.note) == (0, 1e-4, "no inputs are rounded to int8")


@pytest.mark.whole
def test_a_bundle_alone_shows_faults_too(own_bundle: Path) -> None:
    golden = from_json(Golden, check_manifest(own_bundle)["golden"], "golden")
    damage(own_bundle, wrong_scale)
    tiers = parity.bundle_tiers(own_bundle, golden, "fp32", provider="cpu", threads=1)
    assert [tier.tier for tier in tiers] == list("defgh")
    assert [tier.tier for tier in tiers if tier.passed is False] == ["g"]
    assert tiers[-2].top1_agreement == 1 - tiers[-2].max_error / tiers[-2].scale


@pytest.mark.whole
def test_left_padding_is_measured_as_shipped_too(
    own_bundle: Path, rewritten: Rewritten, probe: Probe
) -> None:
    def measured() -> dict[str, ParityTier]:
        tiers, _ = runtime_tiers(own_bundle, rewritten, probe, provider="cpu", threads=1)
        return {tier.tier: tier for tier in tiers}

    sound = measured()
    shipped = Session.from_pretrained(own_bundle, provider="cpu", threads=1)
    rows = [shipped.prefill_logits(np.array([prompt]))[:, -1] for prompt in probe.unequal()]
    assert sound["h"].scale == pytest.approx(np.abs(rows).max())
    assert sound["h"].scale != pytest.approx(sound["f"].scale, rel=1e-4), (
        "level 4 has other logits than level 0"
    )
    assert (sound["h"].passed, sound["h"].bound) == (None, None)
    with pytest.raises(InputError, match="tier h is what left padding changes"):
        assert_parity(own_bundle, tier="h")
    damage(own_bundle, no_mask)
    assert measured()["h"].relative_error > 100 * sound["h"].relative_error


@pytest.mark.whole
def test_no_bundle_is_left_when_parity_fails(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_wrong(graph: object, folder: Path) -> None:
        save_graph(graph, folder)
        damage(folder, wrong_scale)

    monkeypatch.setattr(write_bundle, "save_graph", save_wrong)
    with pytest.raises(ParityError, match=r"tier c .*tier g") as caught:
        rk_export.compress(llama, tmp_path / "out", tiny_options(), run=Run(threads=1))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_require_parity_names_what_failed() -> None:
    good = ParityTier("c", "good", 0.1, 10.0, 0.1, passed=True)
    info = ParityTier("a", "info", 9.0, 10.0)
    require_parity((good, info), "here")
    with pytest.raises(ParityError, match=r"here: .*tier c \(good\): 0\.1 on a scale of 10") as caught:
        require_parity((replace(good, passed=False), info), "here")
    assert "info" not in str(caught.value)


# --- the assertion for users' tests


@pytest.mark.whole
def test_assert_parity_returns_what_it_judged(llama: Path, bundle: Path) -> None:
    assert "".join(tier.tier for tier in assert_parity(bundle)) == "defg"
    assert "".join(tier.tier for tier in assert_parity(bundle, llama)) == "0pcdefg"
    (tier,) = assert_parity(bundle, llama, tier="c")
    assert tier.tier == "c"
    assert "".join(tier.tier for tier in assert_parity(bundle, llama, tier=["g", "c"])) == "cg"


@pytest.mark.whole
def test_assert_parity_with_a_bound_of_ones_own(llama: Path, bundle: Path) -> None:
    (tier,) = assert_parity(bundle, llama, tier="a", bound=1e6)
    assert (tier.bound, tier.passed) == (1e6, True)
    with pytest.raises(AssertionError, match=r"out of bound on tier a, c\n") as caught:
        assert_parity(bundle, llama, tier="ac", bound=1e-12)
    assert "PyTorch prepared vs factorized" in str(caught.value)
    assert "fail" in str(caught.value).lower()
    assert "left-padded" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"tier": "z"}, "tier: unknown tier 'z'"),
        ({"tier": ""}, "tier: no tier"),
        ({"tier": "c"}, "model: tier c compares with PyTorch"),
        ({"tier": "a", "model": "somewhere"}, "tier: tier a is the error of the compression"),
        ({"tier": ["c", "b"], "model": "somewhere"}, "tier: tier b is the error of the compression"),
        ({"tier": "d", "bound": -1.0}, "bound: -1.0 is no bound"),
        ({"bound": math.nan}, "bound: nan is no bound"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_assert_parity_refuses_before_it_measures(options: dict[str, object], where: str) -> None:
    with pytest.raises(InputError) as caught:
        assert_parity("no-bundle-here", **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(where)
    assert caught.value.fix
