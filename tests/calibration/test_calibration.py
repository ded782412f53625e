"""Statistics gathered layer by layer against whole forward passes of the dense and of the rewritten model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from made_recipes import made_recipe
from torch import Tensor, nn

from rk_export.calibration import streamed_moments as calibration
from rk_export.calibration.moments import MomentSum
from rk_export.calibration.streamed_moments import CalibrationStreams, calibration_tokens
from rk_export.errors import InputError
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import RankRule
from rk_export.options.texts import TextFile
from rk_export.passes.base import Layer
from rk_export.passes.numerics.curvature import Curvature
from rk_export.plan import SitePlan
from rk_export.planning.planner import decide_plan
from rk_export.source.stored import StoredModel, open_source

SourceOf = Callable[..., StoredModel]
Statistics = list[dict[str, Curvature]]
FAMILIES = ("llama", "gemma3", "gpt2", "opt", "phi3", "mixtral", "bert")


def tokens_for(source: StoredModel, sequences: int = 5, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(3, source.config.vocab_size, (sequences, length), generator=generator)


def disturb(module: nn.Module, seed: int) -> None:
    """Stand in for a rewrite: change every weight a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def sites_of(source: StoredModel, index: int) -> tuple[SitePlan, ...]:
    groups = ("qk",) if source.config.model_type in ("bert", "gpt2") else None
    return decide_plan(source, made_recipe(groups=groups, rank=RankRule("keep", 0.95))).of_layer(index)


def gather(source: StoredModel, tokens: Tensor, *, embedding: bool = False, **options: Any) -> Statistics:
    """Carry tokens through a model whose layers are disturbed one after the other."""
    model = source.skeleton()
    source.load_rest(model)
    options = {"dtype": torch.float32, **options}
    streams = CalibrationStreams(model, source.architecture, tokens, **options)
    if embedding:
        disturb(model.get_submodule(source.architecture.embedding), 99)
    streams.start()
    gathered = []
    for index in range(source.layer_count):
        layer = Layer(index, source.load_layer(model, index), 2)
        gathered.append(streams.observe(index, layer, sites_of(source, index)))
        disturb(layer.module, index)
        streams.advance(index)
    return gathered


def inputs(
    source: StoredModel, tokens: Tensor, index: int, path: str, *, disturbed: Sequence[int] = ()
) -> Tensor:
    """Return what a matrix reads in a whole model some of whose layers are disturbed, (tokens, in)."""
    model = source.load()
    layers = model.get_submodule(source.architecture.layers)
    for number in disturbed:
        disturb(layers[number], number)
    seen: list[Tensor] = []
    layers[index].get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_whole_models(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    tokens = tokens_for(source)
    for index, statistics in enumerate(gather(source, tokens)):
        sites = [site for site in sites_of(source, index) if "expert" not in site.members]
        assert set(statistics) == {site.site for site in sites}
        for site in sites:
            x = inputs(source, tokens, index, site.paths[0], disturbed=range(index))
            dense = inputs(source, tokens, index, site.paths[0])
            moments = statistics[site.site].inputs
            assert moments.tokens == tokens.numel()
            assert moments.second.dtype == torch.float32
            torch.testing.assert_close(moments.second.double(), x.T @ x / len(x), rtol=2e-4, atol=2e-5)
            if index == 0:
                assert moments.cross is None
            else:
                assert moments.cross is not None
                torch.testing.assert_close(moments.cross.double(), dense.T @ x / len(x), rtol=2e-4, atol=2e-5)
                assert not torch.allclose(moments.cross, moments.second, rtol=1e-2)


def test_chunks_add_up(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of("llama")
    whole = gather(source, tokens_for(source))
    monkeypatch.setattr(calibration, "CHUNK", 24)  # two sequences
    for one, many in zip(whole, gather(source, tokens_for(source)), strict=True):
        for site in one:
            torch.testing.assert_close(many[site].inputs.second, one[site].inputs.second)
            assert many[site].inputs.tokens == one[site].inputs.tokens


def test_an_embedding_that_changes_is_seen_in_the_first_layer(source_of: SourceOf) -> None:
    source = source_of("llama")
    first = gather(source, tokens_for(source), embedding=True)[0]["layers.0.qk"].inputs
    dense = inputs(source, tokens_for(source), 0, "self_attn.q_proj")
    assert first.cross is not None
    assert not torch.allclose(first.second, (dense.T @ dense / len(dense)).float(), rtol=1e-2)


def test_without_cross_moments_the_others_stay(source_of: SourceOf) -> None:
    source = source_of("llama")
    tokens = tokens_for(source)
    for one, other in zip(gather(source, tokens), gather(source, tokens, cross=False), strict=True):
        for site, statistics in one.items():
            assert other[site].inputs.cross is None
            assert torch.equal(other[site].inputs.second, statistics.inputs.second)


def test_sites_that_read_the_same_share_their_moments(source_of: SourceOf) -> None:
    source = source_of("llama")
    statistics = gather(source, tokens_for(source))[1]
    assert statistics["layers.1.qk"].inputs is statistics["layers.1.v"].inputs
    assert statistics["layers.1.qk"].inputs is not statistics["layers.1.gate_up"].inputs


def test_bfloat16_is_close(source_of: SourceOf) -> None:
    source = source_of("llama")
    tokens = tokens_for(source)
    exact, rough = gather(source, tokens)[1], gather(source, tokens, dtype=torch.bfloat16)[1]
    for site, statistics in exact.items():
        second = statistics.inputs.second
        difference = float((rough[site].inputs.second - second).norm() / second.norm())
        assert 1e-6 < difference < 3e-2


def expert_site(expert: int, names: Sequence[str]) -> SitePlan:
    paths = tuple(f"mlp.experts.{expert}.{name}" for name in names)
    return SitePlan(f"layers.1.expert{expert}", 1, ("expert",) * len(names), paths, "dense", 0, None)


def test_experts_have_moments_where_tokens_reach_them(
    source_of: SourceOf, caplog: pytest.LogCaptureFixture
) -> None:
    """Two tokens reach at most four of eight experts; a site of matrices that read different inputs has none."""
    source = source_of("mixtral", num_local_experts=8)
    tokens = tokens_for(source, 1, 2)
    model = source.skeleton()
    source.load_rest(model)
    streams = CalibrationStreams(model, source.architecture, tokens, dtype=torch.float32)
    streams.start()
    streams.observe(0, Layer(0, source.load_layer(model, 0), 2), ())
    disturb(model.get_submodule("model.layers.0"), 0)
    streams.advance(0)
    sites = [expert_site(expert, ("gate_proj", "up_proj")) for expert in range(8)]
    mixed = expert_site(0, ("gate_proj", "down_proj"))
    mixed = SitePlan("layers.1.mixed", 1, mixed.members, mixed.paths, "dense", 0, None)
    with caplog.at_level(logging.INFO):
        found = streams.observe(1, Layer(1, source.load_layer(model, 1), 2), (*sites, mixed))
    assert 2 <= len(found) <= 4
    assert sum(statistics.inputs.tokens for statistics in found.values()) == 2 * tokens.numel()
    for name, statistics in found.items():
        path = f"mlp.experts.{name.removeprefix('layers.1.expert')}.gate_proj"
        x = inputs(source, tokens, 1, path, disturbed=(0,))
        torch.testing.assert_close(statistics.inputs.second.double(), x.T @ x / len(x), rtol=2e-4, atol=2e-5)
        assert statistics.inputs.cross is None
    assert caplog.text.count("no token reached it") >= 4
    assert "layers.1.mixed" not in found


@pytest.mark.parametrize("diagonal", [False, True])
def test_sums_over_chunks(diagonal: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [1 + torch.randn(2, count, 9, generator=generator) for count in (1, 30, 7)]
    total = MomentSum(diagonal=diagonal)
    for part in parts:
        total.add(part.to(device))
    x = torch.cat([part.flatten(0, 1) for part in parts]).double()
    expected = x.T @ x
    torch.testing.assert_close(
        total.total().double(), expected.diagonal() if diagonal else expected, rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(total.mean(), total.total() / 76)
    with pytest.raises(ValueError, match="no token"):
        MomentSum().total()


def test_corpus_tokens_are_cut_into_sequences(llama: Path, prose: Path) -> None:
    source = open_source(llama)  # 128 positions
    long = prose.with_name("long.txt")
    long.write_text(prose.read_text(encoding="utf-8") * 4, encoding="utf-8")
    tokens = calibration_tokens(source, CalibrationOptions(TextFile.of(long), 600), torch.device("cpu"))
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (4, 128))
    from rk_export.text import tokens_of

    assert tokens.flatten().tolist() == tokens_of(long, llama)[:512].tolist()


def test_corpora_that_cannot_be_used(llama: Path, prose: Path, tmp_path: Path) -> None:
    source, cpu = open_source(llama), torch.device("cpu")
    with pytest.raises(InputError, match=r"the text has \d+ tokens, 16384"):
        calibration_tokens(source, CalibrationOptions(TextFile.of(prose), 16384), cpu)
    with pytest.raises(InputError, match="no such file"):
        calibration_tokens(source, CalibrationOptions(TextFile.of(tmp_path / "none.txt")), cpu)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        calibration_tokens(source, CalibrationOptions(TextFile.of(binary)), cpu)
    source.config.vocab_size = 20
    long = tmp_path / "long.txt"
    long.write_text(prose.read_text(encoding="utf-8") * 4, encoding="utf-8")
    with pytest.raises(InputError, match="vocabulary of 20"):
        calibration_tokens(source, CalibrationOptions(TextFile.of(long), 512), cpu)
    with pytest.raises(ValueError, match="uses no text"):
        calibration_tokens(source, CalibrationOptions("gain"), cpu)


def test_self_tokens_are_sampled(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def sampled(
        source: StoredModel, tokens: int, seed: int, device: torch.device, *, other: object
    ) -> Tensor:
        asked.append((tokens, seed))
        return torch.zeros(1, 1, dtype=torch.int64)

    monkeypatch.setattr(calibration, "self_text", sampled)
    calibration_tokens(source_of("llama"), CalibrationOptions(tokens=600, seed=5), torch.device("cpu"))
    assert asked == [(600, 5)]
