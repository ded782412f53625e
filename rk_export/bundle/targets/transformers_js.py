"""A bundle as a folder that transformers.js 4 loads, under Node and in browsers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import onnx

from rk_export.bundle.targets.base import Deployment, Target
from rk_export.bundle.targets.js_graph import (
    SUFFIXES,
    dtype_of,
    keep_logits,
    name_batch,
    read_graph,
    rename_data,
)
from rk_export.bundle.targets.js_tables import expand_tables
from rk_export.bundle.targets.links import link_or_copy
from rk_export.errors import InputError
from rk_export.runtime.bundle_files import TOKENIZER_FILE, read_json
from rk_export.runtime.chat_files import DEFAULT, TemplateFiles
from rk_export.runtime.special_tokens import CONFIG_FILE, SpecialTokens, token_text
from rk_export.runtime.text import TextCodec

logger = logging.getLogger(__name__)

# The exported families that transformers.js 4.3 has a class for; the tests in Node compare the list with the library.
MODEL_TYPES = frozenset(
    [
        *(
            "apertus",
            "arcee",
            "cohere",
            "cohere2",
            "ernie4_5",
            "exaone",
            "gemma",
            "gemma2",
            "gemma3_text",
        ),
        *("glm", "gpt2", "granite", "granitemoehybrid", "helium", "hunyuan_v1_dense", "llama", "ministral"),
        *(
            "ministral3",
            "mistral",
            "olmo",
            "olmo2",
            "olmo3",
            "opt",
            "phi",
            "phi3",
            "qwen2",
            "qwen3",
            "qwen3_moe",
        ),
        *("smollm3", "starcoder2", "vaultgemma"),
    ]
)
ENCODER_TYPES = frozenset(
    [
        *("bert", "camembert", "distilbert", "electra", "eurobert", "modernbert", "mpnet", "nomic_bert"),
        *("roberta", "xlm-roberta"),
    ]
)
_LARGEST_FILE = 2**31 - 1  # bytes that a browser reads into one buffer


def write_folder(deployment: Deployment, folder: Path) -> None:
    """Write ``onnx/``, the configs and the tokenizer.

    The weights and what stays as it is are hard links to the bundle's files. The graph is written anew: its
    weights' file has another name, and ``num_logits_to_keep`` takes the place of ``logits_start``.

    Args:
        deployment: The bundle.
        folder: The model's folder, empty.

    Raises:
        InputError: The bundle has no graph or tokenizer, or transformers.js has no class for its model type.
    """
    bundle = deployment.bundle
    model, config = read_graph(bundle), _config(bundle)
    tokenizer = _tokenizer_config(bundle)
    dtype = dtype_of(model.graph)
    data = _write_graph(model, bundle, folder, f"model{SUFFIXES[dtype]}.onnx")
    # Browsers load no more files than they are told of; under Node, too, the dtype need not be given then.
    config["transformers.js_config"] = {"dtype": dtype, "use_external_data_format": data}
    _write_json(folder / "config.json", config)
    _write_json(folder / CONFIG_FILE, tokenizer)
    for name in (TOKENIZER_FILE, "generation_config.json"):
        if (bundle / name).is_file():
            link_or_copy(bundle / name, folder / name)


def _config(bundle: Path) -> dict[str, Any]:
    """Return the model's config; transformers.js looks up the class by ``model_type``."""
    config = read_json(bundle / "config.json")
    known = MODEL_TYPES | ENCODER_TYPES
    if config.get("model_type") not in known:
        raise InputError(
            f"transformers.js has no class for the model type {config.get('model_type')!r}",
            where=str(bundle / "config.json"),
            fix=f"serve it with another target; it has classes for {', '.join(sorted(known))}",
        )
    return config | _older_spelling(config)


def _older_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that transformers.js reads as older checkpoints spell them."""
    if config["model_type"] == "exaone":
        return {"num_layers": config["num_hidden_layers"]}
    if config["model_type"] == "granitemoehybrid":
        return {"layer_types": ["attention"] * config["num_hidden_layers"]}
    return {}


def _tokenizer_config(bundle: Path) -> dict[str, Any]:
    """Return the tokenizer's config with all that transformers.js reads from no other file.

    These are the chat templates and the special tokens. ``add_bos_token`` makes its pipeline encode a prompt as
    ``tokenizer.json`` says: without it, the pipeline leaves out the special tokens.
    """
    config = read_json(bundle / CONFIG_FILE)
    named = SpecialTokens.read(bundle).named
    missing = {name: text for name, text in named.items() if token_text(config.get(name)) != text}
    adds = bool(TextCodec(bundle / TOKENIZER_FILE).encode(""))
    return {**config, **missing, "add_bos_token": adds, **_chat_template(bundle)}


def _chat_template(bundle: Path) -> dict[str, Any]:
    """Return the field ``chat_template``: a text, or a list of names and texts where there are several."""
    sources = TemplateFiles.read(bundle).sources
    if not sources:
        return {}
    if set(sources) == {DEFAULT}:
        return {"chat_template": sources[DEFAULT]}
    return {"chat_template": [{"name": name, "template": text} for name, text in sources.items()]}


def _write_graph(model: onnx.ModelProto, bundle: Path, folder: Path, file: str) -> int:
    """Write the graph and link its weights; return the number of their files."""
    name_batch(model.graph)
    keep_logits(model.graph)
    expand_tables(model.graph)
    names = rename_data(model.graph, file)
    (folder / "onnx").mkdir()
    for old, new in names.items():
        link_or_copy(bundle / old, folder / "onnx" / new)
        if (bundle / old).stat().st_size > _LARGEST_FILE:
            logger.warning("%s: larger than 2 GiB: Node loads it, browsers do not", old)
    (folder / "onnx" / file).write_bytes(model.SerializeToString())
    return len(names)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


TARGET = Target(
    "transformers.js",
    "a model folder for transformers.js 4 in Node and browsers, hard links to the bundle's weights",
    write_folder,
)
