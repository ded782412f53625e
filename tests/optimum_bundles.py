"""Writes what `make test-optimum` tests: tiny bundles, prompts, and the tokens that our runtime gives each alone.

    python tests/optimum_bundles.py OUT

Runs in the main environment. The tests run in another one, where rk-export is not installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conftest import SENTENCES, VOCABULARY, tiny_options, trained_tokenizer
from tiny_models import tiny_model

from rk_export import compress
from rk_export.options.run import Run
from rk_export.runtime import GenerationOptions, Session

NEW_TOKENS = 12
TEXTS = (SENTENCES[1], "The train", "The committee met on Tuesday", SENTENCES[0])

# In the last two, the heads are not as wide as hidden size / heads, which is 16.
MODELS = {"llama": {}, "qwen3": {"head_dim": 32}, "mistral": {"head_dim": 32}}


def write_bundle(family: str, folder: Path) -> None:
    """Write a bundle in INT4 with tokenizer, and ``expected.json`` beside it.

    Args:
        family: One of `MODELS`.
        folder: The bundle's, made by this.
    """
    source = folder.with_name(f"{family}-model")
    tiny_model(family, vocab_size=VOCABULARY, **MODELS[family]).save_pretrained(source)
    trained_tokenizer().save_pretrained(source)
    compress(source, folder, tiny_options(groups=()), run=Run(threads=1))
    shipped, exact = (
        Session.from_pretrained(folder, provider="cpu", threads=1, accuracy_level=level)
        for level in (None, 0)
    )
    values = {
        "texts": TEXTS,
        "ids": [list(shipped.text_codec.encode(text)) for text in TEXTS],
        "tokens": tokens_of(shipped),
        "tokens_at_level_0": tokens_of(exact),
    }
    folder.with_name(f"{family}-expected.json").write_text(json.dumps(values), encoding="utf-8")


def tokens_of(session: Session) -> list[list[int]]:
    """Return the greedy tokens of each text alone, an end-of-text token included."""
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    return [list(session.generate(text, options=options)[0].token_ids) for text in TEXTS]


if __name__ == "__main__":
    for name in MODELS:
        write_bundle(name, Path(sys.argv[1]) / name)
