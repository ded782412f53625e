"""Command-line arguments of compression, and the options that they make."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rk_export.cli.method_arguments import methods, named_recipe, takes_rank_rule
from rk_export.errors import InputError

if TYPE_CHECKING:
    from rk_export.options.calibration import CalibrationOptions
    from rk_export.options.quantization import QuantSpec
    from rk_export.options.ranks import Budget, RankRule
    from rk_export.options.recipe import Recipe

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_WHOLE_BITS = (2, 4, 8, 16)


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides where low rank goes and how much of it."""
    parser.add_argument(
        "--groups",
        help="matrices that may be factorized, joined ones as one name: qk, qkv, gate_up, q ... or none "
        "(default: with a budget every matrix by itself, else qk,gate_up)",
    )
    parser.add_argument("--qk", help="factorize qk whole or per-head (default whole)")
    parser.add_argument(
        "--form", help="plain factor pairs or identity (default: a budget chooses, else plain)"
    )
    rank = parser.add_mutually_exclusive_group()
    rank.add_argument(
        "--keep", type=float, help="share of the groups' parameters to keep, spent where it counts most"
    )
    rank.add_argument("--size", help="budget for the model's files: 90MB, 1.2GB")
    rank.add_argument("--speed-up", type=float, help="budget: dense time over compressed time, measured here")
    rank.add_argument("--rank", type=int, help="the same rank for every group")
    rank.add_argument("--energy", type=float, help="share of the squared singular values to keep")
    parser.add_argument(
        "--uniform", action="store_true", default=None, help="with --keep: the same share of every group"
    )
    parser.add_argument(
        "--allocation",
        help="with --keep as a rank rule (--uniform): spread the share by spectra: energy, gavish-donoho, "
        "effective-rank or stable-rank (default uniform)",
    )
    parser.add_argument("--phase", help="what --speed-up counts: prefill or decode (default decode)")
    parser.add_argument(
        "--rank-multiple", type=int, help="round ranks down to a multiple (default by size and bits)"
    )
    parser.add_argument("--metric", help="which errors count: none, gain, self (default) or corpus:FILE")
    parser.add_argument("--calibration-tokens", type=int, help="tokens of self or corpus (default 8192)")
    parser.add_argument(
        "--prefix",
        action="store_true",
        default=None,
        help="take the inputs' moments through the compressed part",
    )
    parser.add_argument("--seed", type=int, help="of sampling and rotations (default 0)")


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides how numbers are stored."""
    parser.add_argument("--gauge", help="orthogonal or balanced factors (default orthogonal)")
    parser.add_argument(
        "--bits",
        type=float,
        help="2, 4, 8, or 16 for floats (default 4); anything between is a mean over the linear layers, scales "
        "included, spent where it counts most",
    )
    parser.add_argument("--block", type=int, help="quantization block: 16, 32, 64, 128, 256 (default 32)")
    parser.add_argument("--asymmetric", action="store_true", default=None, help="store zero points")
    parser.add_argument(
        "--activations",
        type=int,
        help="8 also quantizes the inputs of 8-bit matrices, for CPU prefill (W8A8)",
    )
    parser.add_argument("--quantizer", help="rtn, search or gptq (default gptq)")
    parser.add_argument(
        "--recompute",
        help="of a quantized checkpoint: none carries its codes over where the graph can hold them, all quantizes "
        "anew (default all)",
    )
    parser.add_argument(
        "--prepare",
        help="exact reparameterizations first: fold,rotate,rotate-heads,scale or none (default: those that lower "
        "the predicted loss)",
    )
    parser.add_argument(
        "--embedding-bits", type=int, help="bits of embedding and lm_head (default 8; 16 with --bits 16)"
    )
    parser.add_argument("--ep", help="cpu (fp32), cuda (fp16) or portable (fp16) (default cpu)")
    parser.add_argument(
        "--accuracy-level", type=int, help="MatMulNBits: 4 computes in int8 on CPU, 0 in floats"
    )
    parser.add_argument(
        "--correction",
        type=int,
        metavar="RANK",
        help="float branch that corrects every dense quantized matrix",
    )
    add_context_argument(parser)


def add_context_argument(parser: argparse.ArgumentParser) -> None:
    """Add what says how long a text may be."""
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="most tokens of prompt and answer together (default the model's own)",
    )


def compress_options(args: argparse.Namespace) -> Recipe | None:
    """Return the options that were given, or None if not one was.

    Raises:
        InputError: If a value cannot be used, or two arguments do not go together.
    """
    from rk_export.options.method import STAGES
    from rk_export.options.recipe import Recipe

    given = {name: getattr(args, name, None) for name in _PLAIN}
    rank, budget = _rank_rule(args), _budget(args)
    base = named_recipe(args, rank, budget)
    given |= {
        "rank": rank,
        "budget": budget,
        "groups": None if args.groups is None else _names(args.groups),
        "prepare": None if getattr(args, "prepare", None) is None else _names(args.prepare),
        "calibration": _calibration(args),
    }
    changes = {name: value for name, value in given.items() if value is not None} | _quantization(args)
    if asked := (*methods(args), *(() if base is None else base.methods)):
        changes["methods"] = tuple(sorted(asked, key=lambda method: STAGES.index(method.stage)))
    if base is None:
        return replace(Recipe(), **changes) if changes else None
    return replace(base, **changes)


_PLAIN = (
    "allocation",
    "qk",
    "form",
    "rank_multiple",
    "gauge",
    "ep",
    "accuracy_level",
    "quantizer",
    "recompute",
    "correction",
    "context_length",
)


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def _rank_rule(args: argparse.Namespace) -> RankRule | None:
    from rk_export.options.ranks import RankRule

    if args.uniform and args.keep is None:
        raise InputError("goes with --keep", where="--uniform", fix="give --keep SHARE, or drop it")
    for kind in ("keep", "rank", "energy"):
        value = getattr(args, kind)
        if value is not None and (kind != "keep" or _is_uniform(args)):
            return RankRule(kind, value)
    return None


def _is_uniform(args: argparse.Namespace) -> bool:
    """Whether --keep is the same share everywhere, not a budget."""
    return bool(args.uniform) or takes_rank_rule(args)


def _budget(args: argparse.Namespace) -> Budget | None:
    from rk_export.options.ranks import Budget

    phase = {} if args.phase is None else {"phase": args.phase}
    if phase and args.speed_up is None:
        raise InputError("goes with --speed-up", where="--phase", fix="give --speed-up FACTOR, or drop it")
    if args.keep is not None and not _is_uniform(args):
        return Budget("keep", args.keep)
    if args.size is not None:
        return Budget("size", parse_size(args.size))
    if args.speed_up is not None:
        return Budget("speed_up", args.speed_up, **phase)
    bits = getattr(args, "bits", None)
    if bits is None or bits in _WHOLE_BITS:
        return None
    return Budget("bits", bits)


def parse_size(text: str) -> float:
    """Return the bytes that a size like 90MB, 1.2GB or 90000000 stands for.

    Raises:
        InputError: If it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if match is None:
        raise InputError(f"{text!r} is no size", where="--size", fix="write 90MB or 1.2GB")
    return float(match[1]) * _UNITS[match[2]]


def _calibration(args: argparse.Namespace) -> CalibrationOptions | None:
    from rk_export.options.calibration import CalibrationOptions
    from rk_export.options.texts import TextFile

    given: dict[str, Any] = {"tokens": args.calibration_tokens, "seed": args.seed, "prefix": args.prefix}
    if args.metric is not None:
        given["metric"], _, corpus = args.metric.partition(":")
        given["corpus"] = TextFile.of(corpus) if corpus else None
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(CalibrationOptions(), **changes) if changes else None


def _quantization(args: argparse.Namespace) -> dict[str, QuantSpec | None]:
    from rk_export.options.quantization import W8A8, QuantSpec

    names = ("bits", "block", "asymmetric", "embedding_bits", "activations")
    bits, block, asymmetric, embedding_bits, activations = (getattr(args, name, None) for name in names)
    if activations not in (None, 8, 16):
        raise InputError(f"{activations} bits", where="--activations", fix="choose 8, or 16 for floats")
    if activations == 8 and (bits not in (None, 8) or block is not None or asymmetric):
        raise InputError(
            "int8 inputs go with 8-bit symmetric weights, one scale a row",
            where="--activations",
            fix="drop --bits, --block and --asymmetric",
        )
    if bits is not None and bits not in _WHOLE_BITS:
        bits = None  # a mean: the planner chooses
    if all(value is None for value in (bits, block, asymmetric, embedding_bits, activations)):
        return {}

    def spec(bits: int) -> QuantSpec | None:
        if bits == 16:
            return None
        return QuantSpec(bits, 32 if block is None else block, symmetric=not asymmetric)

    bits = 4 if bits is None else int(bits)
    embedding_bits = (16 if bits == 16 else 8) if embedding_bits is None else embedding_bits
    return {"quant": W8A8 if activations == 8 else spec(bits), "embedding_quant": spec(embedding_bits)}
