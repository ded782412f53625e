"""LoRA adapters and other kinds, beside the base models that they are meant for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from conftest import VOCABULARY
from peft_adapters import edit_adapter, trained
from tiny_models import tiny_model

from input_cases.case import Build, Case, Given


def adapted(
    family: str = "llama", *, named: bool = True, changes: dict[str, Any] | None = None, **fields: Any
) -> Build:
    """Return what writes a base model and an adapter with random values.

    Args:
        family: Family of the base model.
        named: The adapter names where its base lies; else the base is given.
        changes: Fields of adapter_config.json that are changed afterwards.
        **fields: Of PEFT's LoraConfig, and `tie_word_embeddings` of the base model.
    """
    tied = {"tie_word_embeddings": fields.pop("tie_word_embeddings", False)}

    def build(folder: Path) -> Given:
        base, adapter = folder / "base", folder / "adapter"
        tiny_model(family, **tied).save_pretrained(base)
        model = trained(base, adapter, **fields)
        edit_adapter(
            adapter, **(changes or {}), **({} if named else {"base_model_name_or_path": "../elsewhere"})
        )
        return Given(adapter, model.merge_and_unload, base=None if named else base)

    return build


def on_a_tied_matrix(folder: Path) -> Given:
    """Pairs on an embedding that the head is tied to; merged by PEFT, they would change the head too."""
    base, adapter = folder / "base", folder / "adapter"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(base)
    model = trained(base, adapter, target_modules=["embed_tokens", "q_proj"])
    return Given(adapter, lambda: model)


def without_base(folder: Path) -> Given:
    """An adapter that names a base which is not there."""
    given = adapted()(folder)
    shutil.rmtree(folder / "base")
    return given


def of_another_model(folder: Path) -> Given:
    """An adapter beside a base of another width."""
    given = adapted(named=False)(folder)
    tiny_model("llama", hidden_size=32).save_pretrained(folder / "narrow")
    return Given(given.model, base=folder / "narrow")


def base_of_no_adapter(folder: Path) -> Given:
    """A plain model, and a base model for it."""
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(folder / "model")
    return Given(folder / "model", base=folder / "model")


def in_one_folder(folder: Path) -> Given:
    """An adapter in the folder of its base model."""
    given = adapted()(folder)
    shutil.copytree(folder / "base", given.model, dirs_exist_ok=True)
    edit_adapter(given.model, base_model_name_or_path="nowhere/at-all")
    return given


CASES = (
    Case("LoRA", "an adapter that names its base model", "merged", adapted()),
    Case(
        "LoRA, --base",
        "an adapter whose base model lies elsewhere, and --base",
        "merged",
        adapted(named=False),
    ),
    Case("LoRA beside its base", "adapter and base model in one folder", "merged", in_one_folder),
    Case(
        "LoRA of every linear layer",
        "pairs on all linear layers of a Qwen2, and trained biases",
        "merged",
        adapted("qwen2", target_modules="all-linear", bias="all"),
    ),
    Case(
        "rsLoRA with a trained head",
        "rank-stabilized pairs, and a head that was trained whole",
        "merged",
        adapted(use_rslora=True, modules_to_save=["lm_head"]),
    ),
    Case(
        "trained head, tied base",
        "a head that was trained whole, and a base model that ties it",
        "merged",
        adapted(modules_to_save=["lm_head"], tie_word_embeddings=True),
    ),
    Case(
        "pairs on a tied embedding",
        "pairs on the embedding, and a base model that ties the head to it",
        "merged",
        on_a_tied_matrix,
    ),
    Case(
        "ranks by pattern",
        "another rank and alpha for some modules",
        "merged",
        adapted(rank_pattern={"v_proj": 2}, alpha_pattern={r"model\.layers\.0\.self_attn\.q_proj": 3}),
    ),
    Case("DoRA", "pairs with magnitudes", "merged", adapted(use_dora=True)),
    Case(
        "LoRA of GPT-2",
        "pairs on transposed matrices",
        "merged",
        adapted("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    ),
    Case(
        "LoRA of fused matrices",
        "pairs on qkv_proj and gate_up_proj of a Phi-3",
        "merged",
        adapted("phi3", target_modules=["qkv_proj", "gate_up_proj"]),
    ),
    Case(
        "LoRA without its base", "the base model that the adapter names is not there", "refused", without_base
    ),
    Case("LoRA of another model", "--base names a model of another width", "refused", of_another_model),
    Case("base of no adapter", "--base beside a plain model", "refused", base_of_no_adapter),
    Case("IA3", "an adapter of the kind IA3", "refused", adapted(changes={"peft_type": "IA3"})),
    Case(
        "PiSSA",
        "an adapter whose start also changed the base model",
        "refused",
        adapted(changes={"init_lora_weights": "pissa_niter_4"}),
    ),
    Case(
        "another rank",
        "adapter_config.json says another rank than the file",
        "refused",
        adapted(changes={"r": 3}),
    ),
)
