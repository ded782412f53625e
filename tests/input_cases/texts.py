"""Tokenizers, ends, contexts, positions and values: what shows when a bundle is made or run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from chat_tokenizers import write_tokenizer
from conftest import VOCABULARY, tiny_options, trained_tokenizer
from hub_snapshots import snapshot
from longrope_models import CONTEXT, FIELDS, prompt
from rope_configs import LINEAR, LLAMA3, SHORT_YARN, YARN
from runtime_models import byte_tokenizer
from tiny_models import massive, tiny_model, transformers_own

from input_cases.case import Build, Case, Given
from input_cases.folders import changed, config, saved

PROMPT = (1, 70, 80, 90)
SAMPLED = tuple(
    prompt(30, seed=0)
)  # far from an end: greedy decoding goes on for 24 tokens in every family here


def spoken(folder: Path, **fields: Any) -> Path:
    """Write a tiny Llama with the trained tokenizer."""
    model = saved(folder, **{"vocab_size": VOCABULARY, **fields})
    trained_tokenizer().save_pretrained(model)
    return model


def no_end(folder: Path) -> Given:
    """A model that ends nowhere."""
    model = saved(folder, eos_token_id=None)
    write_tokenizer(model, None, eos_token=None)
    return Given(model)


def end_of_the_tokenizer(folder: Path) -> Given:
    """A model whose tokenizer alone names the end, a token that greedy decoding is known to write."""
    fields = {"vocab_size": VOCABULARY, "eos_token_id": 2}
    model = saved(folder, **fields)
    (model / "generation_config.json").unlink()
    torch_model = transformers_own(model)
    made = torch_model.generate(
        torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    written = [token for token in made[0, len(PROMPT) :].tolist() if 2 < token < 256]
    text = next(text for text, index in byte_tokenizer().get_vocab().items() if index == written[3])
    write_tokenizer(model, None, eos_token=text)
    return Given(model, lambda: transformers_own(model), prompt=PROMPT, ends=(2, written[3]))


def sentencepiece_that_is_none(folder: Path) -> Given:
    """A tokenizer.model with other content."""
    model = saved(folder)
    (model / "tokenizer.model").write_bytes(b"no protocol buffer at all")
    return Given(model)


def settings_alone(folder: Path) -> Given:
    """A tokenizer_config.json without a vocabulary."""
    model = saved(folder)
    (model / "tokenizer_config.json").write_text("{}")
    return Given(model)


def broken_tokenizer(folder: Path) -> Given:
    """Half of tokenizer.json."""
    model = spoken(folder)
    text = (model / "tokenizer.json").read_text(encoding="utf-8")
    (model / "tokenizer.json").write_text(text[: len(text) // 2], encoding="utf-8")
    return Given(model)


def end_that_is_no_id(folder: Path) -> Given:
    """A generation_config.json whose end is a word."""
    model = spoken(folder)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    return Given(model)


def with_massive_row(folder: Path) -> Given:
    """One row of the first down-projection a thousand times larger."""
    model = massive(spoken(folder), folder / "massive")
    return Given(model, lambda: transformers_own(model))


def rounded_with_massive_row(folder: Path) -> Given:
    """The same, to be rounded to INT4: inputs of some matrices must stay in floats."""
    return Given(with_massive_row(folder).model, recipe=tiny_options(groups=(), rank=None))


def tokenizer_with_more(folder: Path) -> Given:
    """A tokenizer with tokens that the embedding has no row for, and a prompt without them."""
    model = spoken(folder)
    tokenizer = trained_tokenizer()
    tokenizer.add_tokens([f"<|filler {index}|>" for index in range(VOCABULARY - len(tokenizer) + 3)])
    tokenizer.save_pretrained(model)
    return Given(model, lambda: transformers_own(model), prompt=PROMPT, ends=(2,))


def tokenizer_of_another_model(folder: Path) -> Given:
    """A tokenizer with more than twice the model's vocabulary."""
    model = saved(folder, vocab_size=100)
    trained_tokenizer().save_pretrained(model)
    return Given(model)


def broken_template(folder: Path) -> Given:
    """A chat template with a syntax error."""
    model = spoken(folder)
    (model / "chat_template.jinja").write_text("{% if %}")
    return Given(model, lambda: transformers_own(model), prompt=PROMPT, ends=(2,))


def asked(*ids: int) -> Build:
    """Return what exports a tiny Llama and gives it a prompt."""

    def build(folder: Path) -> Given:
        model = spoken(folder)
        return Given(model, lambda: transformers_own(model), prompt=ids, ends=(2,))

    return build


def positions(family: str, *, length: int = 24, context: int | None = None, **fields: Any) -> Build:
    """Return what writes a model with a rotation of its own, and asks for a context."""

    def build(folder: Path) -> Given:
        model = saved(folder, family, **fields)
        return Given(
            model,
            lambda: tiny_model(family, **fields),
            context=context,
            length=length,
            prompt=SAMPLED,
            ends=(2,),
        )

    return build


def linked(folder: Path) -> Given:
    """A bundle whose files are links, as the hub's cache keeps them."""
    model = spoken(folder)
    return Given(
        model,
        lambda: transformers_own(model),
        placed=lambda bundle: snapshot(bundle, folder / "hub"),
        prompt=PROMPT,
        ends=(2,),
    )


CASES = (
    Case("no end token", "no file names a token at which a text ends", "refused", no_end),
    Case(
        "end named by the tokenizer",
        "the end is named in tokenizer_config.json alone",
        "read",
        end_of_the_tokenizer,
    ),
    Case(
        "end that is no id", "generation_config.json has a word as eos_token_id", "refused", end_that_is_no_id
    ),
    Case("no tokenizer", "a model without a tokenizer", "read", changed()),
    Case("broken tokenizer.json", "half of tokenizer.json", "refused", broken_tokenizer),
    Case(
        "broken tokenizer.model",
        "tokenizer.model is no SentencePiece model",
        "refused",
        sentencepiece_that_is_none,
    ),
    Case(
        "tokenizer with more tokens", "tokens that the embedding has no row for", "read", tokenizer_with_more
    ),
    Case(
        "tokenizer of another model",
        "a tokenizer of 320 tokens, an embedding of 100",
        "refused",
        tokenizer_of_another_model,
    ),
    Case("broken chat template", "a chat template with a syntax error", "read", broken_template),
    Case("settings alone", "tokenizer_config.json without a vocabulary", "refused", settings_alone),
    Case("prompt of ids", "token ids of the vocabulary", "read", asked(*PROMPT), "run"),
    Case(
        "ids beyond the embedding",
        "a token id that the embedding has no row for",
        "refused",
        asked(1, VOCABULARY),
        "run",
    ),
    Case("negative ids", "a token id of -1", "refused", asked(1, -1), "run"),
    Case("Llama 3 scaling", "rotary scaling of Llama 3", "read", positions("llama", rope_parameters=LLAMA3)),
    Case("linear scaling", "linear rotary scaling", "read", positions("llama", rope_parameters=LINEAR)),
    Case(
        "YaRN",
        "YaRN, and a text that crosses the original 32 positions",
        "read",
        positions("llama", length=100, rope_parameters=YARN),
    ),
    Case(
        "longer context, YaRN",
        "--context-length 512 of a model that states 128 and is scaled to 512",
        "read",
        positions("llama", length=512, context=512, rope_parameters=SHORT_YARN),
    ),
    Case(
        "shorter context",
        "--context-length 64 of a model that states 128",
        "read",
        positions("llama", length=64, context=64),
    ),
    Case(
        "context beyond learned positions",
        "--context-length 200 of a GPT-2 with 128 learned positions",
        "refused",
        positions("gpt2", context=200),
    ),
    Case(
        "unknown rotary scaling",
        "a rotary scaling that transformers does not know",
        "refused",
        changed(config(rope_parameters={"rope_type": "unheard_of", "rope_theta": 1e4})),
    ),
    Case(
        "LongRoPE, short texts",
        "LongRoPE, logits before its switch at 40 tokens, greedy tokens across it",
        "read",
        positions("phi3", **FIELDS),
    ),
    Case(
        "LongRoPE, long texts",
        "LongRoPE, logits of a text beyond its switch at 40 tokens",
        "read",
        positions("phi3", length=CONTEXT, **FIELDS),
    ),
    Case("bundle of links", "a bundle whose files are links, as in the hub's cache", "read", linked),
    Case("sliding windows", "a Gemma 3 with windows of 5", "read", positions("gemma3", length=100)),
    Case("massive activation", "a row of down_proj a thousand times larger", "read", with_massive_row),
    Case(
        "massive activation, INT4", "the same, rounded to INT4", "read", rounded_with_massive_row, "compress"
    ),
)
