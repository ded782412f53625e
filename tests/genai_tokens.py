"""Greedy tokens of one bundle in ONNX Runtime GenAI and in our runtime, in a form that can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rk_export.runtime import FinishReason, Generation, GenerationOptions, Session

THREADS = 2


def our_tokens(bundle: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue each prompt alone; an end-of-text token is left out, as GenAI leaves it out."""
    session = Session.from_pretrained(bundle, provider="cpu", threads=THREADS)
    options = GenerationOptions(max_new_tokens=new_tokens)
    return [_without_end(session.generate(list(prompt), options=options)[0]) for prompt in prompts]


def genai_tokens(bundle: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue each prompt alone, with the folder as it is."""
    genai: Any = pytest.importorskip("onnxruntime_genai")
    config = genai.Config(str(bundle))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}
    config.overlay(json.dumps(overlay))
    model = genai.Model(config)
    return [_continue(genai, model, prompt, new_tokens) for prompt in prompts]


def _without_end(generation: Generation) -> list[int]:
    tokens = list(generation.token_ids)
    return tokens[:-1] if generation.finish_reason is FinishReason.EOS else tokens


def _continue(genai: Any, model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
