"""Models that read images around a language model, and model types that rk-export does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from acme_models import AcmeConfig
from checkpoint_files import edit_tensors
from conftest import VOCABULARY, trained_tokenizer
from tiny_models import tiny_config
from tiny_wrappers import WRAPPERS, edit_json, save_as_named_today, tiny_wrapper
from transformers import PretrainedConfig

from input_cases.case import Build, Case, Given
from rk_export.model.tiny_version import random_model


def wrapped(name: str, change: Callable[[Path], object] | None = None, *, named_today: bool = False) -> Build:
    """Return what writes a tiny wrapper with a tokenizer and changes its folder.

    Args:
        name: One of `WRAPPERS`.
        change: Changes the folder.
        named_today: Save the tensors by the names of the modules, not by the older ones.
    """

    def build(folder: Path) -> Given:
        text = {**WRAPPERS[name]["text_config"], "vocab_size": VOCABULARY}
        model = tiny_wrapper(name, text_config=text)
        save = save_as_named_today if named_today else type(model).save_pretrained
        save(model, folder / "model")
        trained_tokenizer().save_pretrained(folder / "model")
        if change is not None:
            change(folder / "model")
        return Given(folder / "model", lambda: model, prompt=tuple(range(5, 25)), ends=(2,))

    return build


def around(model_type: str, wrapper: str = "llava", **fields: Any) -> Build:
    """Return what writes a wrapper around a text model of a type."""

    def build(folder: Path) -> Given:
        text = {**WRAPPERS[wrapper]["text_config"], "model_type": model_type, **fields}
        tiny_wrapper(wrapper, text_config=text).save_pretrained(folder / "model")
        return Given(folder / "model")

    return build


def acme(**fields: Any) -> Build:
    """Return what writes a model of a type that only the tests know, with options of a Llama and of its own."""

    def build(folder: Path) -> Given:
        values = tiny_config("llama", vocab_size=VOCABULARY).to_dict()
        config: PretrainedConfig = AcmeConfig(
            **{name: value for name, value in values.items() if name != "model_type"}, **fields
        )
        model = random_model(config)
        model.save_pretrained(folder / "model")
        trained_tokenizer().save_pretrained(folder / "model")
        return Given(folder / "model", lambda: model, prompt=tuple(range(5, 25)), ends=(2,))

    return build


def _without_images(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda stored: {
            name: tensor for name, tensor in stored.items() if name.startswith("language_model.")
        },
    )


CASES: tuple[Case, ...] = (
    Case("text model of LLaVA", "a LLaVA around a Llama, names as saved", "read", wrapped("llava")),
    Case(
        "text model of Gemma 3",
        "a Gemma 3 that reads images, tensors named as its modules are",
        "read",
        wrapped("gemma3", named_today=True),
    ),
    Case(
        "text model of Qwen2.5-VL",
        "a Qwen2.5-VL with windows and positions in three rows",
        "read",
        wrapped("qwen2_5_vl"),
    ),
    Case(
        "text model alone in a wrapper's folder",
        "the config of a LLaVA, and the tensors of its text model alone",
        "read",
        wrapped("llava", _without_images),
    ),
    Case("wrapper of another text model", "a LLaVA around a Persimmon", "refused", around("persimmon")),
    Case(
        "prompts in both directions",
        "a PaliGemma, whose config leaves its attention to the default",
        "refused",
        around("gemma2", "paligemma", use_bidirectional_attention=None),
    ),
    Case(
        "quantized wrapper",
        "a LLaVA whose outer config says MXFP4",
        "refused",
        wrapped(
            "llava",
            lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"}),
        ),
    ),
    Case(
        "known family under another name",
        "a model type that is a Llama, with a field that does nothing",
        "read",
        acme(flavour="sour"),
    ),
    Case(
        "unknown type with other logits",
        "a model type that is a Llama with a factor on the logits",
        "refused",
        acme(logit_factor=0.5),
    ),
    Case(
        "unknown type with an idle limit",
        "a model type that is a Llama with a limit that tiny models never reach",
        "refused",
        acme(logit_limit=900.0),
    ),
)
