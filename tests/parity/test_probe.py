"""What the probe crosses: the lengths at which a config makes the model compute otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from tiny_models import tiny_config, tiny_model

import rk_export
from rk_export.json_codec import from_json, to_json
from rk_export.model.description import describe
from rk_export.model.switches import switches_of
from rk_export.options.run import Run
from rk_export.parity.greedy import Golden
from rk_export.parity.probe import AFTER, BEFORE, LONGEST, Probe, make_probe
from rk_export.parity.tiers import bundle_tiers

LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "partial_rotary_factor": 1.0,
    }
}


def probe_of(folder: Path, family: str, **overrides: Any) -> Probe:
    config = tiny_config(family, **overrides)
    return make_probe(folder, config.vocab_size, switches_of(describe(config)))


@pytest.mark.parametrize(
    ("family", "overrides", "crossed"),
    [
        ("llama", {}, []),
        ("gpt2", {}, []),
        ("bert", {}, []),
        ("mistral", {"sliding_window": 5}, []),  # the common prompts cross it
        ("mistral", {"sliding_window": None}, []),
        ("mistral", {"sliding_window": 100}, [100]),
        ("mistral", {"sliding_window": 128}, []),  # never reached within 128 positions
        ("gemma2", {"sliding_window": 40}, [40]),
        ("qwen2", {"sliding_window": 50}, []),  # not turned on
        ("qwen2", {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 1}, [50]),
    ],
)
def test_windows_are_crossed(
    tmp_path: Path, family: str, overrides: dict[str, Any], crossed: list[int]
) -> None:
    probe = probe_of(tmp_path, family, **overrides)
    assert [item.switch.tokens for item in probe.crossings] == crossed
    for item in probe.crossings:
        assert item.start == item.switch.tokens - BEFORE
        assert len(item.tokens) == min(item.switch.tokens + AFTER, 128)
    assert {len(prompt) for prompt in probe.prompts} == {32}


def test_a_switch_that_nobody_can_afford_is_named(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, "mistral", sliding_window=4096, max_position_embeddings=32768)
    assert [len(item.tokens) for item in probe.crossings] == [4096 + AFTER]
    beyond = probe_of(tmp_path, "mistral", sliding_window=LONGEST, max_position_embeddings=32768)
    assert beyond.crossings == ()
    assert beyond.crossed() == "; the sliding window at 4,608 tokens is not crossed: beyond 4,608 tokens"


def test_prompts_stay_on_one_side_of_a_long_rotation(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, "phi3", **LONGROPE, original_max_position_embeddings=24)
    assert {len(prompt) for prompt in probe.prompts} == {24}
    assert "switch of the long rotation at 24 tokens" in probe.crossed()


def test_what_travels_with_a_bundle_comes_back(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, "mistral", sliding_window=100)
    golden = Golden(probe, tuple((index,) for index in range(9)), 1e-4, 0.2)
    assert from_json(Golden, json.loads(json.dumps(to_json(golden))), "golden") == golden
    assert [len(start) for start in golden.starts] == [32] * 8 + [100 - BEFORE]


@pytest.mark.whole
def test_a_wrong_window_shows_only_beyond_the_common_prompts(tmp_path: Path) -> None:
    """The window of 100 lies beyond the 32 tokens of a prompt and the 64 new ones."""
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_model("mistral", sliding_window=100, max_position_embeddings=256).save_pretrained(model)
    tiers = {tier.tier: tier for tier in rk_export.export(model, out, run=Run(threads=1)).parity}
    assert all("one of 116 tokens crosses the sliding window" in tiers[tier].note for tier in "eg")
    narrow_windows(out / "model.onnx", 98)
    golden = from_json(Golden, unchecked_manifest(out)["golden"], "golden")
    common = replace(golden, probe=Probe(golden.probe.prompts), tokens=golden.tokens[:8])
    assert failed_tiers(out, common) == ""
    assert failed_tiers(out, golden) == "g"


def narrow_windows(path: Path, keys: int) -> None:
    graph = onnx.load(path, load_external_data=False)
    nodes = [node for node in graph.graph.node if node.op_type == "GroupQueryAttention"]
    windows = [item for node in nodes for item in node.attribute if item.name == "local_window_size"]
    assert [item.i for item in windows] == [100, 100]
    for item in windows:
        item.i = keys
    path.write_bytes(graph.SerializeToString())


def unchecked_manifest(bundle: Path) -> Any:
    """Read the manifest of a bundle whose graph no longer is what its checksum says."""
    return json.loads((bundle / "rk_manifest.json").read_text(encoding="utf-8"))


def failed_tiers(bundle: Path, golden: Golden) -> str:
    tiers = bundle_tiers(bundle, golden, "fp32", provider="cpu", threads=1)
    return "".join(tier.tier for tier in tiers if tier.passed is False)
