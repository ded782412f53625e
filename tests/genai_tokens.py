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
    genai, model = _opened(bundle)
    return [_continue(genai, model, [prompt], new_tokens)[0] for prompt in prompts]


def generator_tokens(bundle: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue prompts of unequal length as one batch of a `Generator`, which are padded on the right."""
    genai, model = _opened(bundle)
    return _continue(genai, model, prompts, new_tokens)


def engine_tokens(bundle: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue prompts of unequal length in an `Engine`, which gives each row a length of its own."""
    genai, model = _opened(bundle)
    engine = genai.Engine(model)
    requests = [engine.create_request() for _ in prompts]
    for request, prompt in zip(requests, prompts, strict=True):
        options = genai.TurnOptions(request)
        options.set_do_sample(False)
        options.set_max_generated_tokens(new_tokens)
        request.begin_turn(np.array(prompt, np.int32), options)
    events = engine.create_event_buffer(4 * len(prompts))
    rows: list[list[int]] = [[] for _ in prompts]
    while engine.has_pending_requests():
        for event in engine.run(events):  # the events are written anew by the next run
            if event.flags.value & genai.EngineEventFlags.TOKEN.value:
                rows[requests.index(event.request)].append(int(event.token))
    return rows


def _opened(bundle: Path) -> tuple[Any, Any]:
    genai: Any = pytest.importorskip("onnxruntime_genai")
    config = genai.Config(str(bundle))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}
    config.overlay(json.dumps(overlay))
    return genai, genai.Model(config)


def _without_end(generation: Generation) -> list[int]:
    tokens = list(generation.token_ids)
    return tokens[:-1] if generation.finish_reason is FinishReason.EOS else tokens


def _continue(genai: Any, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, batch_size=len(prompts), max_length=longest + new_tokens)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [
        [int(token) for token in generator.get_sequence(index)[longest:]] for index in range(len(prompts))
    ]
