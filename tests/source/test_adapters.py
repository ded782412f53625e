"""LoRA adapters: the merged model equals peft's, and what cannot be merged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from peft_adapters import ATTENTION, edit_adapter, peft, trained
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, transformers_own

from rk_export.errors import InputError
from rk_export.source.stored import open_source

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from family and config fields to the folder of a tiny model."""
    folders: dict[str, Path] = {}

    def base(family: str, **fields: Any) -> Path:
        key = repr((family, sorted(fields.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("base") / family
            tiny_model(family, **fields).save_pretrained(folders[key])
        return folders[key]

    return base


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def relative_error(adapter: Path, expected: torch.Tensor, base: Path | None = None) -> float:
    got = logits(open_source(adapter, base).load())
    return float((got - expected).abs().max() / expected.abs().max())


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {}),
    "every linear layer": ("qwen2", {"target_modules": "all-linear"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "down_proj"]}),
    "rank stabilized": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
            "alpha_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 3},
        },
    ),
    "all biases": ("qwen2", {"bias": "all"}),
    "biases of changed layers": ("qwen2", {"bias": "lora_only"}),
    "bias of the pair": ("qwen2", {"lora_bias": True}),
    "trained embedding and head": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "trained norm": ("llama", {"modules_to_save": ["norm"]}),
    "DoRA": ("llama", {"use_dora": True, "target_modules": [*ATTENTION, "up_proj"]}),
    "DoRA of an embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    "DoRA of Conv1D": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fused matrices": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "scaled embedding": ("gemma3", {"target_modules": ["q_proj", "o_proj"]}),
    "attention beside experts": ("mixtral", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_peft(base_of: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    family, fields = KINDS[kind]
    model = trained(base_of(family), tmp_path / "adapter", **fields)
    changed = logits(model)
    assert float((changed - logits(transformers_own(base_of(family)))).abs().max()) > 1e-2, (
        "the adapter does nothing"
    )
    expected = logits(model.merge_and_unload())
    assert relative_error(tmp_path / "adapter", expected) < 1e-5
    assert relative_error(tmp_path / "adapter", changed) < 1e-5


def test_pairs_of_single_experts(base_of: Callable[..., Path], tmp_path: Path) -> None:
    """Adapters from before transformers joined experts; the sum is written into the checkpoint for comparison."""
    base, adapter, summed = base_of("mixtral"), tmp_path / "adapter", tmp_path / "summed"
    module = "model.layers.1.block_sparse_moe.experts.2.w2"
    generator = torch.Generator().manual_seed(3)
    A, B = (torch.randn(shape, generator=generator) for shape in ((4, 128), (64, 4)))
    adapter.mkdir()
    pair = {f"base_model.model.{module}.lora_{part}.weight": W for part, W in (("A", A), ("B", B))}
    save_file(pair, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    shutil.copytree(base, summed)
    tensors = load_file(summed / "model.safetensors")
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + 2 * B @ A
    save_file(tensors, summed / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(adapter, logits(transformers_own(summed)), base) < 1e-5


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_pair_on_one_of_two_tied_matrices_unties_them(
    base_of: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    model = trained(base_of("llama", tie_word_embeddings=True), tmp_path / "adapter", target_modules=[target])
    source = open_source(tmp_path / "adapter")
    assert source.config.tie_word_embeddings is False
    assert any("untied" in notice for notice in source.notices)
    assert relative_error(tmp_path / "adapter", logits(model)) < 1e-5


def test_a_trained_head_on_a_tied_model_unties_it(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama", tie_word_embeddings=True)
    model = trained(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    assert open_source(tmp_path / "adapter").config.tie_word_embeddings is False
    assert relative_error(tmp_path / "adapter", logits(model.merge_and_unload())) < 1e-5


@pytest.mark.parametrize(("family", "copied"), [("llama", "embed_tokens"), ("gpt2", "wte")])
def test_a_trained_embedding_on_a_tied_model_unties_it(
    base_of: Callable[..., Path], tmp_path: Path, family: str, copied: str
) -> None:
    base = base_of(family, tie_word_embeddings=True)
    targets = ["c_attn"] if family == "gpt2" else ATTENTION
    model = trained(base, tmp_path / "adapter", target_modules=targets, modules_to_save=[copied])
    assert open_source(tmp_path / "adapter").config.tie_word_embeddings is False
    assert relative_error(tmp_path / "adapter", logits(model)) < 1e-5
    assert relative_error(tmp_path / "adapter", logits(model.merge_and_unload())) < 1e-5


def test_a_copied_embedding_that_keeps_its_tie(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama", tie_word_embeddings=True)
    model = trained(base, tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert relative_error(tmp_path / "adapter", logits(model)) < 1e-5


def test_a_base_of_another_family_with_the_same_names_is_refused(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    trained(base_of("llama"), tmp_path / "adapter")
    with pytest.raises(
        InputError, match="made on a LlamaForCausalLM, the base model is of the type 'mistral'"
    ):
        open_source(tmp_path / "adapter", base_of("mistral"))


def test_another_base_than_the_named_one_is_said(
    base_of: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(base_of("llama"), tmp_path / "adapter")
    edit_adapter(tmp_path / "adapter", base_model_name_or_path="org/another-model")
    open_source(tmp_path / "adapter", base_of("llama"))
    assert "names org/another-model as its base model" in caplog.text


def test_an_adapter_in_integers_is_refused(base_of: Callable[..., Path], tmp_path: Path) -> None:
    trained(base_of("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InputError, match="is stored as I8"):
        open_source(tmp_path / "adapter")


def test_a_tie_that_the_adapter_keeps_stays(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama", tie_word_embeddings=True)
    model = trained(
        base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    )
    assert open_source(tmp_path / "adapter").config.tie_word_embeddings is True
    assert relative_error(tmp_path / "adapter", logits(model)) < 1e-5


def test_half_precision_adapter_and_base(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    transformers_own(base_of("llama")).to(torch.bfloat16).save_pretrained(base)
    trained(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}, path)
    model = peft.PeftModel.from_pretrained(transformers_own(base), tmp_path / "adapter").eval()
    assert relative_error(tmp_path / "adapter", logits(model.merge_and_unload()), base) < 1e-5


def test_a_resized_vocabulary(base_of: Callable[..., Path], tmp_path: Path) -> None:
    base = base_of("llama")
    grown = transformers_own(base)
    grown.resize_token_embeddings(168, mean_resizing=False)
    model = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=ATTENTION))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    source = open_source(tmp_path / "adapter", base)
    assert source.config.vocab_size == 168
    assert relative_error(tmp_path / "adapter", logits(model.eval()), base) < 1e-5


def test_the_base_is_given_named_or_in_the_same_folder(base_of: Callable[..., Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    expected = logits(trained(base_of("llama"), adapter))
    assert relative_error(adapter, expected) < 1e-5
    edit_adapter(adapter, base_model_name_or_path="../base")
    with pytest.raises(InputError, match="give --base MODEL"):
        open_source(adapter)
    assert relative_error(adapter, expected, base_of("llama")) < 1e-5
    shutil.copytree(base_of("llama"), tmp_path / "base")
    assert relative_error(adapter, expected) < 1e-5
    shutil.copytree(base_of("llama"), adapter, dirs_exist_ok=True)
    assert relative_error(adapter, expected) < 1e-5


def test_a_tokenizer_of_the_adapters_own_goes_with_it(llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter")
    assert open_source(tmp_path / "adapter").folder == llama
    shutil.copy(llama / "tokenizer.json", tmp_path / "adapter")
    assert open_source(tmp_path / "adapter").folder == llama
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    (tmp_path / "adapter" / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"truncation": None}, indent=3)
    )
    source = open_source(tmp_path / "adapter")
    assert source.folder == tmp_path / "adapter"
    assert source.origin == (tmp_path / "adapter", llama)


def test_what_is_cached_depends_on_the_adapter(base_of: Callable[..., Path], tmp_path: Path) -> None:
    trained(base_of("llama"), tmp_path / "adapter")
    prints = {open_source(base_of("llama")).fingerprint()}
    prints.add(open_source(tmp_path / "adapter").fingerprint())
    edit_adapter(tmp_path / "adapter", lora_alpha=9)
    prints.add(open_source(tmp_path / "adapter").fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"peft_type": "IA3"}, "an adapter of the kind IA3"),
        ({"peft_type": "PROMPT_TUNING"}, "an adapter of the kind PROMPT_TUNING"),
        ({"peft_type": None}, "an adapter of the kind None"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 0}, "rank is below 1"),
        ({"r": 3}, "has rank 4, adapter_config.json says 3"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank 4, adapter_config.json says 2"),
        ({"lora_alpha": "many"}, "cannot be read"),
        ({"lora_alpha": float("nan")}, "cannot be read"),
        ({"alpha_pattern": {"(": 2}}, "cannot be read"),
    ],
)
def test_adapters_that_are_refused(
    base_of: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    trained(base_of("llama"), tmp_path / "adapter")
    edit_adapter(tmp_path / "adapter", **changes)
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "adapter", base_of("llama"))
    assert what in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    ("family", "fields", "what"),
    [
        ("llama", {"hidden_size": 32}, "its matrix has"),
        ("llama", {"num_hidden_layers": 1}, "the files hold 2 layers, config.json says 1"),
        ("gpt2", {}, "the adapter was made on a LlamaForCausalLM"),
    ],
)
def test_another_base_is_refused(
    base_of: Callable[..., Path], tmp_path: Path, family: str, fields: dict[str, Any], what: str
) -> None:
    trained(base_of("llama"), tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "adapter", base_of(family, **fields))
    assert what in caught.value.what


def test_a_head_of_another_kind_in_the_adapter_is_refused(
    base_of: Callable[..., Path], tmp_path: Path
) -> None:
    trained(base_of("llama"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.score.weight": torch.zeros(2, 64)}, path)
    with pytest.raises(InputError, match="a head of another kind"):
        open_source(tmp_path / "adapter")


@pytest.mark.whole
def test_base_goes_with_adapters_only(
    cli: Cli, llama: Path, bundle: Path, prose: Path, tmp_path: Path
) -> None:
    for arguments in (
        ("compress", llama, "-o", tmp_path / "out", "--base", llama),
        ("eval", bundle, "--base", llama, "--text", prose),
        ("verify", bundle, "--base", llama),
    ):
        ended = cli(*arguments)
        assert ended.code == 2
        assert "--base: goes with" in ended.err


@pytest.mark.whole
def test_an_adapter_through_the_command_line(cli: Cli, llama: Path, tmp_path: Path) -> None:
    trained(llama, tmp_path / "adapter")
    edit_adapter(tmp_path / "adapter", base_model_name_or_path="nowhere/at-all")
    out, base = tmp_path / "out", ("--base", llama)
    assert "--base MODEL" in cli("export", tmp_path / "adapter", "-o", out).err
    ended = cli("export", tmp_path / "adapter", "-o", out, *base, "--threads", 1)
    assert ended.code == 0, ended.err
    assert "adapter" in json.loads((out / "report.json").read_text())["notices"][0]
    assert cli("verify", out, "--against", tmp_path / "adapter", *base, "--threads", 1).code == 0
    texts = ("--text", tmp_path / "prose.txt", "--context", 32, "--json")
    (tmp_path / "prose.txt").write_text("The train leaves at 9:15 and arrives at 10:45. " * 4)
    scores = cli("eval", tmp_path / "adapter", llama, out, *texts, *base)
    assert scores.code == 0, scores.err
    adapted, dense, bundled = (row["texts"]["prose.txt"]["nll"] for row in json.loads(scores.out))
    assert adapted == pytest.approx(bundled, rel=1e-4)
    assert adapted != pytest.approx(dense, rel=1e-3)
    # Without the adapter it is another model: the graph is not that of the base.
    assert cli("verify", out, "--against", llama, "--threads", 1).code == 1
