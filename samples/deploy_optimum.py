"""A bundle in Optimum's ORTModelForCausalLM; nothing of rk-export is imported.

    python samples/deploy_optimum.py BUNDLE -p "The harbour was quiet"

Needs an environment of its own: ``pip install 'optimum-onnx[onnxruntime]==0.1.0'`` takes transformers below 4.58.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported


def load(bundle: str) -> Any:
    """Return the model, which caches heads of the width that its config names."""
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(
        bundle, provider="CPUExecutionProvider", trust_remote_code=False
    )
    if getattr(
        model.config, "head_dim", None
    ):  # Optimum takes hidden size / heads: huggingface/optimum #2379
        model.embed_size_per_head = model.config.head_dim
    return model


def main(arguments: list[str] | None = None) -> None:
    """Continue a prompt greedily."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("-p", "--prompt", default="The harbour was quiet")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(arguments)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.bundle, trust_remote_code=False)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = load(args.bundle).generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
