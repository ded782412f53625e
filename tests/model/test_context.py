"""The context of a bundle: what a model allows, what is stated everywhere, and logits beyond the old end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, tiny_options, trained_tokenizer
from rope_configs import DYNAMIC, LINEAR, LONGROPE, SHORT_YARN, YARN
from tiny_models import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from rk_export import compress, export
from rk_export.bundle.genai import default_length
from rk_export.errors import InputError
from rk_export.model.context import check_context, context_notices, with_context
from rk_export.model.description import describe
from rk_export.model.families.registry import decoder_spec
from rk_export.model.rotary import rotary_tables
from rk_export.options.run import Run
from rk_export.plan import Plan
from rk_export.runtime import Session

LONG_PHI3 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 17}
MIXED = {
    "full_attention": {**SHORT_YARN, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

ALLOWED: list[tuple[str, dict[str, Any], int | None, str]] = [
    ("llama", {}, None, ""),
    ("llama", {"rope_parameters": LINEAR}, None, ""),
    ("llama", {"rope_parameters": SHORT_YARN}, 512, "rotary scaling is made for 512"),
    ("llama", {"rope_parameters": YARN}, 128, "rotary scaling is made for 128"),
    ("llama", {"rope_parameters": DYNAMIC}, 128, "angles that depend on their length"),
    ("gemma3", {"rope_parameters": MIXED}, 512, "rotary scaling is made for 512"),
    ("phi3", LONG_PHI3, 128, "rotary scaling is made for 128"),
    ("gpt2", {}, 128, "learned 128 positions"),
    ("opt", {}, 128, "learned 128 positions"),
    ("bert", {}, 128, "learned 128 positions"),
]


@pytest.mark.parametrize(("family", "options", "longest", "reason"), ALLOWED)
def test_the_refusal_names_the_longest_context_that_works(
    family: str, options: dict[str, Any], longest: int | None, reason: str
) -> None:
    model = describe(tiny_config(family, **options))
    check_context(model, 64)
    check_context(model, longest or 10**6)
    too_long = 2**24 + 1 if longest is None else longest + 1
    with pytest.raises(InputError, match=reason or "float32") as refusal:
        check_context(model, too_long)
    assert refusal.value.fix == f"give at most {too_long - 1}"


def test_notices_of_a_context_that_was_never_trained_and_of_one_that_could_be_longer() -> None:
    plain = describe(tiny_config("llama"))
    scaled = describe(tiny_config("llama", rope_parameters=SHORT_YARN))
    assert context_notices(plain, None) == context_notices(plain, 64) == context_notices(scaled, 512) == ()
    assert "longer than the 128 that the model was made for" in context_notices(plain, 129)[0]
    assert "give target.context_length 512" in context_notices(scaled, None)[0]


@pytest.mark.parametrize("context", [64, 100])
def test_a_shorter_context_leaves_the_rotation_as_it_is(context: int) -> None:
    """Transformers derives LongRoPE's scale from the length that the config states."""
    config = tiny_config("phi3", **LONG_PHI3)
    stated = with_context(config, context)
    assert stated.max_position_embeddings == context
    module = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    before, after = (rotary_tables(one, module, context, {"all"})["all"] for one in (config, stated))
    assert before.scale == after.scale != 1
    for one, other in zip(before.parts, after.parts, strict=True):
        np.testing.assert_array_equal(one.frequencies, other.frequencies)
    assert config.max_position_embeddings == 128


@pytest.fixture(scope="module")
def yarn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yarn") / "model"
    tiny_model("llama", vocab_size=320, rope_parameters=SHORT_YARN).save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


def assert_context(bundle: Path, model: Path, context: int) -> None:
    """Every file states the context, and the last row of the tables is PyTorch's."""
    assert AutoConfig.from_pretrained(bundle).max_position_embeddings == context
    assert json.loads((bundle / "genai_config.json").read_text())["model"]["context_length"] == context
    assert f"{context:,} tokens" in (bundle / "README.md").read_text()
    session = Session.from_pretrained(bundle, provider="cpu", threads=1, accuracy_level=0)
    assert session.max_length == context
    ids = np.random.default_rng(0).integers(3, 320, (1, context))
    torch_model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(session.prefill_logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    with pytest.raises(InputError, match="--context-length"):
        session.generate([list(map(int, ids[0]))])


@pytest.mark.whole
def test_yarn_is_exported_with_the_length_that_it_is_made_for(yarn: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli("export", yarn, "-o", tmp_path / "out", "--context-length", 512, "--threads", 1)
    assert ended.code == 0, ended.err
    assert_context(tmp_path / "out", yarn, 512)
    refused = cli("export", yarn, "-o", tmp_path / "more", "--context-length", 513)
    assert (refused.code, "give at most 512" in refused.err) == (2, True)


@pytest.mark.whole
@pytest.mark.parametrize("context", [64, 300])
def test_any_rotary_model_takes_a_shorter_or_longer_context(
    llama: Path, tmp_path: Path, context: int
) -> None:
    report = export(llama, tmp_path / "out", context_length=context, run=Run(threads=1))
    assert_context(tmp_path / "out", llama, context)
    assert Plan.load(tmp_path / "out" / "plan.json").recipe.target.context_length == context
    assert any("longer than" in notice for notice in report.notices) is (context > 128)


@pytest.mark.whole
def test_a_checkpoint_is_exported_with_another_context(llama: Path, tmp_path: Path, cli: Cli) -> None:
    options = tiny_options(quant=None, table=None, groups=())
    compress(llama, tmp_path / "a", options, checkpoint=tmp_path / "kept", run=Run(threads=1))
    ended = cli("export", tmp_path / "kept", "-o", tmp_path / "b", "--context-length", 200, "--threads", 1)
    assert ended.code == 0, ended.err
    assert_context(tmp_path / "b", llama, 200)


@pytest.mark.whole
def test_learned_positions_can_be_shorter(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", context_length=70, run=Run(threads=1))
    assert Session.from_pretrained(tmp_path / "out", provider="cpu", threads=1).max_length == 70


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (63, "too short to verify"),
        (-1, "too short to verify"),
        (2**24 + 1, "give at most 16777216"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "plan", "export"])
def test_a_context_that_cannot_be_is_refused(
    command: str, context: int, message: str, llama: Path, tmp_path: Path, cli: Cli
) -> None:
    asked: dict[str, tuple[object, ...]] = {"export": ("--context-length", context)}
    arguments = asked.get(command, ("--set", f"target.context_length={context}"))
    ended = cli(command, llama, "-o", tmp_path / "out", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert not (tmp_path / "out").exists()


def test_a_search_of_genai_allocates_no_gigabytes_by_default() -> None:
    small = tiny_config("llama")
    assert default_length(decoder_spec(small), "cpu", 100) == 100
    assert default_length(decoder_spec(small), "cpu", 131_072) == 4096
    large = tiny_config(
        "llama", num_hidden_layers=32, num_key_value_heads=32, num_attention_heads=32, head_dim=128
    )
    assert default_length(decoder_spec(large), "cuda", 131_072) == 1024
    assert default_length(decoder_spec(large), "cpu", 131_072) == 512
    assert 2 * 32 * 32 * 128 * 4 * 512 == 2**29
