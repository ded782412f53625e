"""Input moments estimated from weights against text whose normalized hidden states are white."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from made_recipes import made_recipe
from scipy.linalg import hadamard
from torch import Tensor

from rk_export.calibration.gain import gain_statistics
from rk_export.options.ranks import RankRule
from rk_export.passes.base import Layer
from rk_export.passes.numerics.curvature import Curvature
from rk_export.planning.planner import decide_plan
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]


def estimate(source: StoredModel) -> tuple[Layer, dict[str, Curvature]]:
    """Return the second layer and the statistics of its sites, by role of the first member."""
    groups = ("qk",) if source.config.model_type in ("bert", "gpt2") else None
    sites = decide_plan(source, made_recipe(groups=groups, rank=RankRule("keep", 0.95))).of_layer(1)
    model = source.skeleton()
    kv_groups = source.description.heads.kv_heads
    layer = Layer(1, source.load_layer(model, 1), kv_groups)
    found = gain_statistics(layer, sites, source.description)
    roles = {site.site: site.members[0] for site in sites}
    return layer, {roles[name]: statistics for name, statistics in found.items()}


def second(statistics: Curvature) -> Tensor:
    assert statistics.inputs.tokens == 0
    assert statistics.inputs.cross is None
    return statistics.inputs.second


@pytest.mark.parametrize(
    ("family", "attention", "mlp", "offset"),
    [
        ("llama", "input_layernorm", "post_attention_layernorm", 0.0),
        ("phi3", "input_layernorm", "post_attention_layernorm", 0.0),
        ("gemma3", "input_layernorm", "pre_feedforward_layernorm", 1.0),
    ],
)
def test_inputs_behind_an_rms_norm(
    source_of: SourceOf, family: str, attention: str, mlp: str, offset: float
) -> None:
    layer, found = estimate(source_of(family))
    for roles, norm in ((("q", "v"), attention), (("gate",), mlp)):
        gain = layer.module.get_submodule(norm).get_parameter("weight") + offset
        for role in roles:
            torch.testing.assert_close(second(found[role]), gain.square().diag(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "starcoder2"])
def test_inputs_behind_a_layer_norm(source_of: SourceOf, family: str) -> None:
    layer, found = estimate(source_of(family))
    names = {"gpt2": ("ln_1", "ln_2"), "opt": ("self_attn_layer_norm", "final_layer_norm")}
    norms = names.get(family, ("input_layernorm", "post_attention_layernorm"))
    for role, name in zip(("q", "up"), norms, strict=True):
        norm = layer.module.get_submodule(name)
        gain, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
        white = torch.eye(len(gain)) - 1 / len(gain)  # without the mean
        expected = gain[:, None] * white * gain + torch.outer(bias, bias)
        torch.testing.assert_close(second(found[role]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2", "opt"])
def test_what_o_reads_is_propagated_through_v(source_of: SourceOf, family: str) -> None:
    """Each query head averages the value head of its group over tokens of its own."""
    source = source_of(family)
    layer, found = estimate(source)
    paths = dict(source.architecture.attention)
    heads = source.description.heads
    norm = layer.module.get_submodule(
        {"gpt2": "ln_1", "opt": "self_attn_layer_norm"}.get(family, "input_layernorm")
    )
    centred = family in ("gpt2", "opt")  # a LayerNorm takes the mean away
    tokens = torch.from_numpy(hadamard(source.config.hidden_size)[int(centred) :]).float()
    with torch.no_grad():
        values = layer.linear(paths["v"])(norm(torch.cat([tokens, -tokens])))
    values = values.unflatten(-1, (heads.kv_heads, heads.head_dim)).transpose(0, 1)
    means, seconds = values.mean(1), values.mT @ values / values.shape[1]
    group = [head // (heads.heads // heads.kv_heads) for head in range(heads.heads)]
    rows = [
        torch.cat([seconds[i] if h == g else torch.outer(means[i], means[j]) for g, j in enumerate(group)], 1)
        for h, i in enumerate(group)
    ]
    expected = torch.cat(rows)
    assert float((second(found["o"]) - expected).norm() / expected.norm()) < (0.02 if centred else 1e-4)


def test_what_down_reads_is_the_product_of_mean_squares(source_of: SourceOf) -> None:
    layer, found = estimate(source_of("llama"))
    gain = layer.module.get_submodule("post_attention_layernorm").get_parameter("weight")
    squares = [
        (layer.linear(f"mlp.{name}").weight * gain).square().sum(1) for name in ("gate_proj", "up_proj")
    ]
    torch.testing.assert_close(second(found["down"]), (squares[0] * squares[1]).diag(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "known"), [("olmo2", set()), ("bert", set()), ("mixtral", {"q", "v", "o"})]
)
def test_sites_that_nothing_is_known_about_have_none(
    source_of: SourceOf, caplog: pytest.LogCaptureFixture, family: str, known: set[str]
) -> None:
    with caplog.at_level(logging.INFO):
        assert set(estimate(source_of(family))[1]) == known
    assert "no norm's gain" in caplog.text
