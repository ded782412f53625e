"""Writes what `make test-sentence-transformers` and part of `make test-optimum` test: models, bundles, what we compute.

    python tests/sentence_bundles.py OUT

Runs in the main environment. The tests run in other ones, where rk-export is not installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import SENTENCES, VOCABULARY, trained_tokenizer
from sentence_models import write_modules
from tiny_models import tiny_config
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from rk_export import Recipe, compress
from rk_export.options.run import Run
from rk_export.runtime import Encoder

TEXTS = (*SENTENCES, "salt", "The train leaves")
PROMPTS = {"query": "train: ", "document": ""}
HIDDEN = 64
LABELS = {0: "harbour", 1: "bread", 2: "train"}

# Family -> what follows its hidden states.
EMBEDDERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pooling": {"pooling_mode": "cls"}},
    "modernbert": {"pooling": {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}},
    "mpnet": {"steps": ({"out_features": 24}, "Normalize")},
}
HEADS = {
    "cross_encoder": (AutoModelForSequenceClassification, 1),
    "classifier": (AutoModelForSequenceClassification, 3),
    "tagger": (AutoModelForTokenClassification, 3),
}


def write_embedder(family: str, folder: Path) -> None:
    """Write a model, its bundle in floats, one in INT4, and ``expected.json``: our vectors of the texts."""
    source = folder / "model"
    _write_model(source, AutoModel.from_config(tiny_config(family, vocab_size=VOCABULARY)))
    # Older versions of transformers, as in the other environments, do not know the class that this one writes.
    path = source / "tokenizer_config.json"
    known = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | known)
    write_modules(source, HIDDEN, **EMBEDDERS[family])
    settings = {"prompts": PROMPTS, "default_prompt_name": "document", "similarity_fn_name": "cosine"}
    _write_json(source / "config_sentence_transformers.json", settings)
    _write_json(source / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})
    expected: dict[str, Any] = {"texts": TEXTS}
    for name, recipe in {"floats": "floats", "int4": "int4"}.items():
        compress(source, folder / name, Recipe.load(recipe), run=Run(threads=1))
        encoder = Encoder(folder / name, provider="cpu", threads=1)
        expected[name] = encoder.encode(TEXTS).tolist()
        expected[f"{name}_queries"] = encoder.encode(TEXTS, prompt_name="query").tolist()
    _write_json(folder / "expected.json", expected)


def write_head(name: str, folder: Path) -> None:
    """Write a classifier, its bundle in INT4, and ``expected.json``: our logits of texts, and of pairs."""
    auto, labels = HEADS[name]
    config = tiny_config("bert", vocab_size=VOCABULARY)
    config.id2label = {index: label for index, label in LABELS.items() if index < labels}
    config.label2id = {label: index for index, label in config.id2label.items()}
    _write_model(folder / "model", auto.from_config(config))
    compress(folder / "model", folder / "int4", Recipe.load("int4"), run=Run(threads=1))
    encoder = Encoder(folder / "int4", provider="cpu", threads=1)
    pairs = [(TEXTS[0], text) for text in TEXTS]
    given = TEXTS if name == "tagger" else pairs
    logits = [np.asarray(row).tolist() for row in encoder.logits(given)]
    expected: dict[str, Any] = {"texts": TEXTS, "logits": logits}
    if name != "tagger":
        expected["scores"] = [one.scores for one in encoder.classify(pairs)]
    _write_json(folder / "expected.json", expected)


def _write_model(folder: Path, model: PreTrainedModel) -> None:
    """Write a model with random weights, all of them, and a tokenizer that marks a pair's second text."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.25 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(folder)
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for family in EMBEDDERS:
        write_embedder(family, out / family)
    for head in HEADS:
        write_head(head, out / head)
