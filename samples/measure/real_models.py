"""Real models in plain INT4, `rk-export compress MODEL --recipe int4`: what is left of each, and what it took.

    python samples/measure/real_models.py                    all four; minutes to half an hour a model
    python samples/measure/real_models.py --rows gemma3      one of them

Writes docs/results/real_models.json and real_models.md. Perplexity is that of the bundle in ONNX Runtime as it is
shipped, beside that of transformers' own model in float32, on the first windows of English Wikipedia. A model whose
tokenizer begins every text with a token of its own gets it in front of each window. An encoder is compared by the
cosine of its sentence embeddings.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from assets import gemma3, minilm, qwen2_5_coder, smollm2, wiki_text
from measure import harness
from measure.harness import Results, Row

from rk_export import EvalText, Recipe, Report, Run, compress, perplexity_of, torch_logits
from rk_export.runtime import EncoderSession, Session

MODELS: dict[str, tuple[str, Callable[[], Path]]] = {
    "smollm2": ("SmolLM2-135M-Instruct", smollm2),
    "qwen": ("Qwen2.5-Coder-0.5B-Instruct", qwen2_5_coder),
    "gemma3": ("Gemma-3-270m", gemma3),
    "minilm": ("all-MiniLM-L6-v2", minilm),
}
ENCODERS = ("minilm",)
WINDOW, WINDOWS = 512, 10
BOUND = 1.15  # of the dense perplexity
SENTENCES = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Compress each model in a process of its own; write JSON and Markdown."""
    parser = harness.parser(__doc__, "rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure one model in this process, or every model that is missing in processes of their own."""
    if args.one:
        print(json.dumps(measure(MODELS[args.one][1](), args.threads, is_encoder=args.one in ENCODERS)))
        return
    results = Results(args.out, "real_models")
    one = partial(harness.in_own_process, __file__, "--threads", str(args.threads), "--one")
    results.measure([(name, partial(one, name)) for name in MODELS], args.rows)
    results.write_page(page(results))


def measure(folder: Path, threads: int, *, is_encoder: bool) -> Row:
    """Compress one model with the preset `int4` and return its row."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        begin = time.perf_counter()
        report = compress(folder, bundle, Recipe.load("int4"), run=Run(threads=threads))
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quality = embeddings if is_encoder else perplexities
        return {
            **quality(folder, bundle, threads),
            **facts(report),
            "seconds": round(seconds),
            "peak_gb": round(peak / 1e6, 2),
        }


def facts(report: Report) -> Row:
    """Return what the report says: size, tiers, reparameterizations, matrices that keep float inputs."""
    details = [finding.details or {} for finding in report.findings]
    return {
        "file_bytes": None if report.size is None else report.size.file_bytes,
        "tiers": {
            tier.tier: [round(tier.max_error / (tier.scale or 1), 8), tier.passed] for tier in report.parity
        },
        "prepared": [
            finding.target.removeprefix("prepare.")
            for finding in report.findings
            if finding.target.startswith("prepare.") and finding.outcome.value == "applied"
        ],
        "float_inputs": sum(item.get("pass") == "accuracy level" for item in details),
        "warnings": list(report.warnings),
    }


def perplexities(folder: Path, bundle: Path, threads: int) -> Row:
    """Return the perplexity of transformers' model and of the bundle."""
    dense = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    expected = windows(torch_logits(dense), folder)
    del dense
    session = Session.from_pretrained(bundle, provider="cpu", threads=threads)
    found = windows(session.prefill_logits, folder)
    return {
        "dense": round(expected.perplexity, 3),
        "dense_error": round(expected.perplexity_error, 3),
        "bundle": round(found.perplexity, 3),
        "ratio": round(found.perplexity / expected.perplexity, 4),
    }


def tokenizer_of(folder: Path) -> Tokenizer:
    """Return a model's tokenizer without padding and truncation."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def windows(logits: Callable[[np.ndarray], Any], folder: Path) -> Any:
    """Measure perplexity over windows that begin as the model's tokenizer begins a text."""
    tokenizer = tokenizer_of(folder)
    first = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    start = first[: len(first) - len(plain)]

    def behind_start(ids: np.ndarray) -> Any:
        return logits(np.concatenate([np.array([start], np.int64), ids], axis=1))[:, len(start) :]

    context = WINDOW - len(start)
    text = EvalText(wiki_text("eval"), context, context * WINDOWS)
    return perplexity_of(behind_start if start else logits, text, folder)


def embeddings(folder: Path, bundle: Path, threads: int) -> Row:
    """Return the cosines between sentence embeddings of transformers' model and of the bundle."""
    lines = wiki_text("eval").read_text(encoding="utf-8").split(". ")
    texts = [line.strip()[:200] for line in lines if len(line) > 40][:SENTENCES]
    session = EncoderSession.from_pretrained(bundle, provider="cpu", threads=threads)
    found = session.embed(texts)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = tokenizer_of(folder)
    cosines = []
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        mean = states.mean(0).numpy()
        cosines.append(float(vector @ (mean / np.linalg.norm(mean))))
    return {"cosine_mean": round(float(np.mean(cosines)), 5), "cosine_least": round(min(cosines), 5)}


def page(results: Results) -> str:
    """Return the figures as a page."""
    rows = results.rows
    lines = [
        "# Real models in plain INT4",
        "",
        "This page shows what `rk-export compress MODEL --recipe int4` does to real models.",
        "",
        f"Made by `python samples/measure/real_models.py`. Perplexity is measured on {WINDOWS} windows of {WINDOW} "
        "tokens of English Wikipedia. Each window follows the token that the tokenizer begins a text with. *Dense* is "
        "transformers in float32. *Reparameterized* names the exact changes that were applied first. *Float inputs* "
        f"counts the matrices that compute in floats. The goal is to stay within {BOUND} times the dense perplexity.",
        "",
        "| model | dense | bundle | ratio | file | reparameterized | float inputs | time | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "dense" in row:
            quality = (
                f"{row['dense']:.2f} ± {row['dense_error']:.2f} | {row['bundle']:.2f} | {row['ratio']:.3f}"
            )
        else:
            quality = f"cosine 1 | mean {row['cosine_mean']:.4f}, least {row['cosine_least']:.4f} | –"
        lines.append(
            f"| {MODELS[name][0]} | {quality} | {row['file_bytes'] / 1e6:.0f} MB "
            f"| {', '.join(row['prepared']) or 'nothing'} | {row['float_inputs']} "
            f"| {row['seconds'] // 60} min {row['seconds'] % 60} s | {row['peak_gb']:.1f} GB |"
        )
    failed = [
        f"{MODELS[name][0]} {tier}"
        for name, row in rows.items()
        for tier, (_, ok) in row["tiers"].items()
        if ok is False
    ]
    lines += ["", f"Parity tiers out of their bound: {', '.join(failed) or 'none'}."]
    lines += [f"- {MODELS[name][0]}: {text}" for name, row in rows.items() for text in row["warnings"]]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
