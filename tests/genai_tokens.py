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
    return [_continue(genai, model, [prompt], new_tokens, _pad(bundle))[0] for prompt in prompts]


def generator_tokens(bundle: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue prompts of unequal length as one batch of a `Generator`, which are padded on the right."""
    genai, model = _opened(bundle)
    return _continue(genai, model, prompts, new_tokens, _pad(bundle))


def generator_texts(
    bundle: Path, texts: Sequence[str], new_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Continue texts that GenAI's own tokenizer turns into one padded batch.

    Returns:
        The tokens of each prompt without padding, and those that follow.
    """
    genai, model = _opened(bundle)
    tokenizer = genai.Tokenizer(model)
    prompts = [[int(token) for token in tokenizer.encode(text)] for text in texts]
    batch = tokenizer.encode_batch(list(texts)).as_numpy()
    return prompts, _continue_padded(genai, model, batch, new_tokens)


def engine_tokens(
    bundle: Path, prompts: Sequence[Sequence[int]], new_tokens: int, arrive_every: int = 0
) -> list[list[int]]:
    """Continue prompts of unequal length in an `Engine`, which gives each row a length of its own.

    Args:
        bundle: The folder.
        prompts: One request each.
        new_tokens: The most tokens of an answer.
        arrive_every: Steps of the engine between two requests; 0 gives all of them before the first step.
    """
    genai, model = _opened(bundle)
    engine = genai.Engine(model)
    waiting, requests = list(prompts), []
    rows: list[list[int]] = [[] for _ in prompts]
    events, steps = engine.create_event_buffer(4 * len(prompts)), 0
    while waiting or engine.has_pending_requests():
        if waiting and (not arrive_every or steps % arrive_every == 0):
            requests.append(_begin(genai, engine, waiting.pop(0), new_tokens))
            if not arrive_every:
                continue
        steps += 1
        for event in engine.run(events):  # the events are written anew by the next run
            if event.flags.value & genai.EngineEventFlags.TOKEN.value:
                rows[requests.index(event.request)].append(int(event.token))
    return rows


def late_engine_tokens(bundle: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue prompts as `engine_tokens` does; a request arrives every five steps, while others run."""
    return engine_tokens(bundle, prompts, new_tokens, arrive_every=5)


def _begin(genai: Any, engine: Any, prompt: Sequence[int], new_tokens: int) -> Any:
    request = engine.create_request()
    options = genai.TurnOptions(request)
    options.set_do_sample(False)
    options.set_max_generated_tokens(new_tokens)
    request.begin_turn(np.array(prompt, np.int32), options)
    return request


def _opened(bundle: Path) -> tuple[Any, Any]:
    genai: Any = pytest.importorskip("onnxruntime_genai")
    config = genai.Config(str(bundle))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}
    config.overlay(json.dumps(overlay))
    return genai, genai.Model(config)


def _without_end(generation: Generation) -> list[int]:
    tokens = list(generation.token_ids)
    return tokens[:-1] if generation.finish_reason is FinishReason.EOS else tokens


def _pad(bundle: Path) -> int:
    """Return the id that GenAI takes for padding: it makes its mask from the ids."""
    return int(json.loads((bundle / "genai_config.json").read_text("utf-8"))["model"]["pad_token_id"])


def _continue(
    genai: Any, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, pad: int
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return _continue_padded(genai, model, ids, new_tokens)


def _continue_padded(genai: Any, model: Any, ids: np.ndarray[Any, Any], new_tokens: int) -> list[list[int]]:
    rows, longest = ids.shape
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, batch_size=rows, max_length=longest + new_tokens)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(index)[longest:]] for index in range(rows)]
