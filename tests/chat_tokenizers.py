"""Byte tokenizers with chat templates, written into folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime_models import byte_tokenizer

CHATML = (
    "{%- if tools %}<tools>{{ tools | tojson(indent=1) }}{% endif -%}"
    "{%- for message in messages %}{{ bos_token if loop.first }}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = CHATML, **config: Any) -> Path:
    """Write a byte tokenizer with ChatML's tokens, which puts <bos> in front, and a tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<|im_end|>"}
    values |= {"chat_template": template} if template is not None else {}
    write_json(folder / "tokenizer_config.json", {**values, **config})
    return folder


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as JSON."""
    path.write_text(json.dumps(values), encoding="utf-8")
