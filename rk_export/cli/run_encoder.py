"""`rk-export run` with an encoder: the vector of a text, or what a classifier says of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rk_export.cli.terminal import print_json
from rk_export.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from rk_export.runtime import Encoder

_SHOWN = 8  # elements of a vector on a line
# What only a model that continues texts reads, and the value that asks for nothing.
_CONTINUING: dict[str, Any] = {
    "chat": False,
    "system": None,
    "template_arg": [],
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop": [],
    "stop_token_id": [],
    "seed": None,
}


def run_encoder(args: argparse.Namespace) -> int:
    """Print what an encoder makes of one text or pair.

    Raises:
        InputError: There is no text, or an option that goes with decoders only.
    """
    if args.prompt is None:
        raise InputError("an encoder does not chat", where=str(args.bundle), fix="give --prompt TEXT")
    for name, neutral in _CONTINUING.items():
        if getattr(args, name) != neutral:
            option = f"--{name.replace('_', '-')}"
            raise InputError("goes with models that continue texts", where=option, fix="drop it")
    from rk_export.runtime import Encoder

    encoder = Encoder(args.bundle, provider=args.provider, threads=args.threads)
    if not encoder.session.has_logits:
        if args.pair is not None:
            raise InputError("goes with classifiers", where="--pair", fix="drop it")
        (vector,) = encoder.encode([args.prompt])
        return _show(args, {"embedding": vector.tolist()}, [_vector(vector)])
    if encoder.session.logits_axes == 3:
        return _tags(args, encoder)
    text = args.prompt if args.pair is None else (args.prompt, args.pair)
    (found,) = encoder.classify([text])
    scores = dict(zip(encoder.labels, found.scores, strict=True))
    lines = [f"{label}  {score:.4f}" for label, score in sorted(scores.items(), key=lambda item: -item[1])]
    return _show(args, {"label": found.label, "score": found.score, "scores": scores}, lines)


def _tags(args: argparse.Namespace, encoder: Encoder) -> int:
    if args.pair is not None:
        raise InputError("this model labels the tokens of one text", where="--pair", fix="drop it")
    (found,) = encoder.tag([args.prompt])
    tokens = [{"start": one.start, "end": one.end, "label": one.label, "score": one.score} for one in found]
    lines = [f"{args.prompt[one.start : one.end]}  {one.label}  {one.score:.4f}" for one in found]
    return _show(args, {"tokens": tokens}, lines)


def _vector(vector: np.ndarray) -> str:
    shown = " ".join(f"{value:.4f}" for value in vector[:_SHOWN])
    rest = " ..." if len(vector) > _SHOWN else ""
    return f"{len(vector)} numbers, all with --json: {shown}{rest}"


def _show(args: argparse.Namespace, document: dict[str, Any], lines: list[str]) -> int:
    if args.json:
        print_json(document)
    else:
        print("\n".join(lines))
    return 0
