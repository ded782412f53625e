"""Real models through the default of `rk-export compress`: what is left of each, and what it took.

python samples/real_models.py                    # all four; minutes to half an hour a model; writes docs/results
python samples/real_models.py --only gemma3      # one of them; the other rows stay

Perplexity is that of the bundle in ONNX Runtime as it is shipped, beside that of transformers' own model in float32, on
the first windows of English Wikipedia. A model whose tokenizer begins every text with a token of its own gets it in
front of each window. An encoder is compared by the cosine of its sentence embeddings.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from rk_export import CompressOptions, compress
from rk_export.evaluation.assets import gemma3, minilm, qwen2_5_coder, smollm2, wiki_text
from rk_export.evaluation.perplexity import perplexity
from rk_export.model.torch_logits import torch_logits
from rk_export.options.run import Run
from rk_export.report.records import Report
from rk_export.runtime import EncoderSession, Session
from rk_export.runtime.text import TextCodec
from rk_export.text import LogitsFn, tokens_of

MODELS: dict[str, tuple[str, Callable[[], Path]]] = {
    "smollm2": ("SmolLM2-135M-Instruct", smollm2),
    "qwen": ("Qwen2.5-Coder-0.5B-Instruct", qwen2_5_coder),
    "gemma3": ("Gemma-3-270m", gemma3),
    "minilm": ("all-MiniLM-L6-v2", minilm),
}
WINDOW, WINDOWS = 512, 10
BOUND = 1.15  # of the dense perplexity
SENTENCES = 64


def main() -> None:
    """Compress each model in a process of its own; write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MODELS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.threads)))
        return
    path = args.results / "real_models.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in args.only or MODELS:
        command = [sys.executable, __file__, "--one", name, "--threads", str(args.threads)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[name] = json.loads(output.splitlines()[-1])
        args.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (args.results / "real_models.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


def measure(name: str, threads: int) -> dict[str, Any]:
    """Compress one model with the defaults and return its row."""
    folder = MODELS[name][1]()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / name
        begin = time.perf_counter()
        report = compress(folder, bundle, CompressOptions(), run=Run(threads=threads))
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quality = embeddings if name == "minilm" else perplexities
        return {
            **quality(folder, bundle, threads),
            **facts(report),
            "seconds": round(seconds),
            "peak_gb": round(peak / 1e6, 2),
        }


def facts(report: Report) -> dict[str, Any]:
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


def perplexities(folder: Path, bundle: Path, threads: int) -> dict[str, Any]:
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


def windows(logits: LogitsFn, folder: Path) -> Any:
    """Measure perplexity over windows that begin as the model's tokenizer begins a text."""
    first = TextCodec(folder / "tokenizer.json").encode("a")
    plain = TextCodec(folder / "tokenizer.json").encode("a", special_tokens=False)
    start = first[: len(first) - len(plain)]

    def behind_start(ids: np.ndarray) -> Any:
        return logits(np.concatenate([np.array([start], np.int64), ids], axis=1))[:, len(start) :]

    context = WINDOW - len(start)
    ids = tokens_of(wiki_text("eval"), folder)
    return perplexity(behind_start if start else logits, ids, context=context, limit=context * WINDOWS)


def embeddings(folder: Path, bundle: Path, threads: int) -> dict[str, Any]:
    """Return the cosines between sentence embeddings of transformers' model and of the bundle."""
    lines = wiki_text("eval").read_text(encoding="utf-8").split(". ")
    texts = [line.strip()[:200] for line in lines if len(line) > 40][:SENTENCES]
    session = EncoderSession.from_pretrained(bundle, provider="cpu", threads=threads)
    found = session.embed(texts)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    codec = TextCodec(folder / "tokenizer.json")
    cosines = []
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([codec.encode(text)])).last_hidden_state[0]
        mean = states.mean(0).numpy()
        cosines.append(float(vector @ (mean / np.linalg.norm(mean))))
    return {"cosine_mean": round(float(np.mean(cosines)), 5), "cosine_least": round(min(cosines), 5)}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a page."""
    lines = [
        "# Real models with the default",
        "",
        "`python samples/real_models.py`: `rk-export compress MODEL` without any option, "
        f"{WINDOWS} windows of {WINDOW}",
        "tokens of English Wikipedia, behind the token that the tokenizer begins a text with. Dense is transformers in",
        f"float32. The default is to stay within {BOUND} times the dense perplexity.",
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
    main()
