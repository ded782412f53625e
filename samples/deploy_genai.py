"""A bundle in ONNX Runtime GenAI, streaming; nothing of rk-export is imported.

    python samples/deploy_genai.py BUNDLE -p "Where is the Eiffel Tower?" --chat

Needs onnxruntime-genai (``pip install 'rk-export[genai]'`` takes the build that fits).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported

import onnxruntime_genai as og


def greedy(model: Any, prompt: Any, count: int) -> Iterator[int]:
    """Yield at most ``count`` greedy tokens after the tokens of a prompt."""
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + count)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def main(arguments: list[str] | None = None) -> None:
    """Answer a prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("-p", "--prompt", default="The harbour was quiet")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(arguments)

    model = og.Model(args.bundle)
    tokenizer = og.Tokenizer(model)
    prompt = args.prompt
    if args.chat:
        messages = json.dumps([{"role": "user", "content": prompt}])
        prompt = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    pieces = tokenizer.create_stream()
    for token in greedy(model, tokenizer.encode(prompt), args.max_new_tokens):
        print(pieces.decode(token), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
