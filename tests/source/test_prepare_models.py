"""Whole models of every family under exact reparameterizations: the logits stay, the weights do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import SourceOf, logits, tokens
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rk_export.errors import InputError
from rk_export.manifest import check_manifest
from rk_export.model.layer_wiring import wiring_of
from rk_export.model.preparable import has_rotated_head, preparations_of
from rk_export.options.prepare import PREPARATIONS
from rk_export.passes.modules.quantized import RotatedHead
from rk_export.report.records import Finding, Outcome
from rk_export.source.prepared import Prepared, save_prepared
from rk_export.source.stored import StoredModel, open_source
from rk_export.source.transformed import Transformed

# Relative to the largest logit, both models evaluated in float64; what is left is the rounding of the new
# weights to float32.
BOUND = 1e-5
# What each family takes of everything, with an untied and with a tied head.
ALL, LAYER_NORM = PREPARATIONS, ("fold", "rotate-heads")
SANDWICH = ("fold", "rotate-heads", "scale")
TAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        (*("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "mixtral", "qwen3_moe"),),
        (ALL, ALL),
    ),
    **dict.fromkeys(("gemma2", "gemma3"), (SANDWICH, SANDWICH)),
    "olmo2": (SANDWICH, ("rotate-heads", "scale")),
    **dict.fromkeys(("starcoder2", "gpt2"), (LAYER_NORM, LAYER_NORM)),
    "opt": ((*LAYER_NORM, "scale"), (*LAYER_NORM, "scale")),
    "bert": ((), ()),
}
BIASES: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}}


def peaks_of(source: StoredModel) -> dict[str, Tensor]:
    """Return random peaks of every down matrix, some neurons silent."""
    if source.architecture.is_encoder:
        return {}
    model, generator = source.load(), torch.Generator().manual_seed(5)
    peaks = {}
    for index in range(source.layer_count):
        for _, down in wiring_of(source.description, index).mlps:
            linear: Any = model.get_submodule(f"{source.architecture.layers}.{index}.{down}")
            drawn = torch.randn(linear.in_features, generator=generator).mul(2).exp()
            drawn[::7] = 0.0
            peaks[f"layers.{index}.{down}"] = drawn
    return peaks


def prepared(source: StoredModel, names: tuple[str, ...] = ALL, **options: Any) -> Transformed:
    return source.then(Prepared(source.description, names, peaks=peaks_of(source), alpha=0.5, **options))


def assert_same_function(actual: Any, expected: Any, ids: Tensor) -> None:
    wanted = logits(expected.double(), ids)
    assert float((logits(actual.double(), ids) - wanted).abs().max()) <= BOUND * float(wanted.abs().max())


def outcome(findings: tuple[Finding, ...], target: str) -> Finding:
    return next(finding for finding in findings if finding.target == target)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_stay_under_everything_a_family_takes(source_of: SourceOf, family: str, tied: bool) -> None:
    source = source_of(family, tie_word_embeddings=tied, **BIASES.get(family, {}))
    new = prepared(source)
    assert new.transforms[0].names == TAKES[family][tied]
    for name in ALL:
        finding = outcome(new.findings, f"prepare.{name}")
        assert (finding.outcome is Outcome.APPLIED) is (name in new.transforms[0].names)
        assert finding.reason or name in new.transforms[0].names
    assert_same_function(new.load(), source.load(), tokens(source))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
@pytest.mark.parametrize("name", ["fold", "rotate", "rotate-heads", "scale"])
def test_each_preparation_alone_changes_what_it_should(source_of: SourceOf, family: str, name: str) -> None:
    source = source_of(family, tie_word_embeddings=False)
    names = ("fold", "rotate") if name == "rotate" else (name,)
    new = prepared(source, names)
    if name not in new.transforms[0].names:
        assert outcome(new.findings, f"prepare.{name}").reason
        return
    before, after = source.load(), new.load()
    wiring = wiring_of(source.description, 1)
    if name == "rotate":  # what folding changes too is no sign of a rotation
        assert set(wiring.writers) <= changed(source, before, after)
        return
    touched = {
        "fold": {*wiring.norms, *wiring.readers},
        "rotate-heads": {wiring.value, wiring.output},
        "scale": {path for pair in wiring.mlps for path in pair},
    }
    assert changed(source, before, after) == touched[name]
    assert_same_function(after, before, tokens(source))


def changed(source: StoredModel, before: Any, after: Any) -> set[str]:
    """Return the modules of layer 1 whose parameters differ."""
    prefix = f"{source.architecture.layers}.1."
    new = after.state_dict()
    return {
        name.removeprefix(prefix).rpartition(".")[0]
        for name, tensor in before.state_dict().items()
        if name.startswith(prefix) and not torch.equal(tensor, new[name])
    }


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        ("gemma2", "rotate", "norms with gains behind its blocks"),
        ("olmo2", "rotate", "norms with gains behind its blocks"),
        ("olmo2", "fold", "no matrix reads a norm alone"),
        ("gpt2", "rotate", "subtracts the mean"),
        ("gpt2", "scale", "gelu_new"),
        ("starcoder2", "scale", "has no gate"),
        ("bert", "rotate-heads", "is an encoder"),
    ],
)
def test_a_family_says_why_it_cannot(source_of: SourceOf, family: str, name: str, words: str) -> None:
    found = preparations_of(source_of(family, tie_word_embeddings=True).description, ("fold", name))
    assert words in outcome(found.findings, f"prepare.{name}").reason


def test_layer_norms_are_folded_only_into_biases(source_of: SourceOf) -> None:
    found = preparations_of(source_of("starcoder2", use_bias=False).description, ("fold",))
    assert "have no biases" in outcome(found.findings, "prepare.fold").reason


def test_gelu_in_opt_cannot_be_scaled(source_of: SourceOf) -> None:
    description = source_of("opt", activation_function="gelu").description
    assert "gelu" in outcome(preparations_of(description, ("scale",)).findings, "prepare.scale").reason


@pytest.mark.parametrize("tied", [False, True])
def test_the_final_gain_goes_where_there_is_room(source_of: SourceOf, tied: bool) -> None:
    source = source_of("llama", tie_word_embeddings=tied)
    folded, rotated = prepared(source, ("fold",)), prepared(source, ("fold", "rotate"))
    targets = {finding.target for finding in folded.findings}
    assert ("prepare.fold.final_norm" in targets) is tied
    assert bool((folded.load().get_submodule("model.norm").weight == 1).all()) is not tied
    model = rotated.load()
    assert bool((model.get_submodule("model.norm").weight == 1).all())
    head = model.get_submodule("lm_head")
    assert isinstance(head, RotatedHead) is tied is has_rotated_head(source.description, ("fold", "rotate"))
    if isinstance(head, RotatedHead):
        assert head.head.weight is model.get_submodule("model.embed_tokens").weight
        assert outcome(rotated.findings, "lm_head.rotation").bytes_after == 64 * 64 * 4


def test_rotations_follow_their_seed(source_of: SourceOf) -> None:
    source = source_of("llama")
    first, again, other = (prepared(source, seed=seed).load().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.embed_tokens.weight"):
        assert not torch.allclose(first[name], other[name])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_loading_twice_prepares_once(source_of: SourceOf, family: str) -> None:
    source = source_of(family, tie_word_embeddings=True)
    new = prepared(source)
    model = new.load()
    new.load_rest(model)
    for index in range(new.layer_count):
        new.load_layer(model, index)
    assert_same_function(model, source.load(), tokens(source))


def test_a_prepared_source_describes_the_same_model(source_of: SourceOf) -> None:
    source = source_of("llama")
    new = prepared(source)
    for name in ("structure", "parameter_count", "stored_bytes"):
        assert getattr(new, name)() == getattr(source, name)()
    assert (new.name, new.title, new.folder) == (source.name, source.title, source.folder)
    assert (new.layer_count, new.architecture) == (source.layer_count, source.architecture)


def test_nothing_asked_for_changes_nothing(source_of: SourceOf) -> None:
    source = source_of("llama")
    new = source.then(Prepared(source.description, ()))
    expected = source.load().state_dict()
    assert new.findings == ()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in new.load().state_dict().items())


def test_bad_requests_are_refused(source_of: SourceOf) -> None:
    source = source_of("llama")
    peaks = peaks_of(source)
    name = "layers.1.mlp.down_proj"
    with pytest.raises(InputError, match="unknown preparation 'spin'"):
        source.then(Prepared(source.description, ("spin",)))
    with pytest.raises(InputError, match="add fold"):
        source.then(Prepared(source.description, ("rotate",)))
    with pytest.raises(InputError, match="prepared already"):
        prepared(source).then(Prepared(source.description, ("fold",)))
    with pytest.raises(InputError, match=f"'{name}' are missing"):
        source.then(
            Prepared(source.description, ("scale",), peaks={key: peaks[key] for key in peaks if key != name})
        )
    for bad in (peaks[name][1:], -peaks[name], peaks[name] * float("nan")):
        with pytest.raises(InputError, match="128 finite numbers"):
            source.then(Prepared(source.description, ("scale",), peaks={**peaks, name: bad}))
    with pytest.raises(InputError, match="alpha of nan"):
        source.then(Prepared(source.description, ("scale",), peaks=peaks, alpha=float("nan")))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_a_plain_one_with_the_same_logits(
    source_of: SourceOf, tmp_path: Path, family: str, tied: bool
) -> None:
    source = source_of(family, tie_word_embeddings=tied)
    findings = save_prepared(source, ALL, tmp_path / "out", peaks=peaks_of(source), alpha=0.5)
    assert [finding.target for finding in findings if finding.outcome is Outcome.APPLIED]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and "rotate" not in TAKES[family][tied])
    eager = {"experts_implementation": "eager"}  # the default kernel knows no float64
    plain, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, **eager
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected, ids = source.load(), tokens(source)
    assert_same_function(plain, expected, ids)
    assert_same_function(open_source(tmp_path / "out").load(), expected, ids)
    assert check_manifest(tmp_path / "out")["prepare"]["names"] == list(TAKES[family][tied])


def test_a_prepared_folder_is_replaced_with_force_only(llama: Path, tmp_path: Path) -> None:
    source = open_source(llama)
    save_prepared(source, ("fold",), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(InputError, match="already exists"):
        save_prepared(source, ("fold",), tmp_path / "out")
    save_prepared(source, ("fold", "rotate"), tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("family", "names"), [("bert", ALL), ("llama", ()), ("gpt2", ("scale",))])
def test_nothing_is_written_where_nothing_applies(
    source_of: SourceOf, tmp_path: Path, family: str, names: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match="nothing to prepare"):
        save_prepared(source_of(family), names, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_not_told_to_choose_other_preparations(source_of: SourceOf, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Fix: compress the model as it is"):
        save_prepared(source_of("bert"), ALL, tmp_path / "out")


def test_an_odd_width_and_one_kv_head(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=80, num_key_value_heads=1, head_dim=48).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert_same_function(prepared(source).load(), source.load(), tokens(source))
