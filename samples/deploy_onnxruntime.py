"""A bundle in plain ONNX Runtime: NumPy, onnxruntime and tokenizers, nothing of rk-export.

    python samples/deploy_onnxruntime.py BUNDLE -p "The harbour was quiet"

The loop shows the contract of the graph. It copies the cache in every step; ``rk_export.runtime.Session`` and
ONNX Runtime GenAI bind one buffer as past and present instead.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def empty_past(session: Any) -> dict[str, np.ndarray]:
    """Return a cache of no positions: keys and values have no length yet, states of short convolutions a fixed size."""
    return {
        value.name: np.zeros(
            [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])], FLOATS[value.type]
        )
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }


def greedy(session: Any, prompt: list[int], count: int) -> Iterator[int]:
    """Yield ``count`` greedy tokens after a prompt."""
    names = [value.name for value in session.get_outputs()]
    past, new, length = empty_past(session), prompt, 0
    for _ in range(count):
        length += len(new)
        feeds = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, length), np.int64),  # covers the past too
            "logits_start": np.array([-1], np.int64),  # optional: logits of the last position only
            **past,
        }
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        token = int(outputs.pop("logits")[0, -1].argmax())
        yield token
        past = {past_name(name): value for name, value in outputs.items()}
        new = [token]


def past_name(present: str) -> str:
    """Return the input that takes an output of the cache."""
    kind, _, rest = present.partition(".")
    return f"past_key_values.{rest}" if kind == "present" else f"past_conv.{rest}"


def end_tokens(bundle: Path) -> set[int]:
    """Return the tokens that end a text."""
    ids = json.loads((bundle / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return set(ids if isinstance(ids, list) else [] if ids is None else [ids])


def main(arguments: list[str] | None = None) -> None:
    """Continue a prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-p", "--prompt", default="The harbour was quiet")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(arguments)

    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # a warning that logits_start is no constant: it may be fed
    session = ort.InferenceSession(args.bundle / "model.onnx", settings, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(args.bundle / "tokenizer.json"))
    ends, tokens = end_tokens(args.bundle), []
    for token in greedy(session, tokenizer.encode(args.prompt).ids, args.max_new_tokens):
        if token in ends:
            break
        tokens.append(token)
    print(args.prompt + tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
