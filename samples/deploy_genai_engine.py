"""Several prompts at once in the engine of ONNX Runtime GenAI; nothing of rk-export is imported.

    python samples/deploy_genai_engine.py BUNDLE -p "The harbour was quiet" -p "The train leaves at"

On the CPU the engine of GenAI 0.18 runs four requests together, and others wait until all four have ended. Each request
gets the tokens that it gets alone.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported

import numpy as np
import onnxruntime_genai as og


def begin(engine: Any, prompt: Any, count: int) -> Any:
    """Hand in a prompt, to be continued greedily by at most ``count`` tokens; return the request."""
    request = engine.create_request()
    options = og.TurnOptions(request)
    options.set_do_sample(False)
    options.set_max_generated_tokens(count)
    request.begin_turn(np.array(prompt, np.int32), options)
    return request


def answers(model: Any, prompts: list[Any], count: int) -> list[list[int]]:
    """Return the tokens after each prompt."""
    engine = og.Engine(model)
    requests = [begin(engine, prompt, count) for prompt in prompts]
    events = engine.create_event_buffer(4 * len(prompts))
    rows: list[list[int]] = [[] for _ in prompts]
    while engine.has_pending_requests():
        for event in engine.run(events):  # read at once: the next run writes over them
            if event.flags.value & og.EngineEventFlags.TOKEN.value:
                rows[requests.index(event.request)].append(int(event.token))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Continue prompts, each on a line of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("-p", "--prompt", action="append", required=True, help="once or more")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(arguments)

    model = og.Model(args.bundle)
    tokenizer = og.Tokenizer(model)
    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    for prompt, row in zip(args.prompt, answers(model, prompts, args.max_new_tokens), strict=True):
        print(repr(prompt + tokenizer.decode(np.array(row, np.int32))))


if __name__ == "__main__":
    main()
