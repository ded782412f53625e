"""`rk-export run`: continues a prompt, answers one message, holds a conversation, or runs an encoder on a text."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from rk_export.cli.terminal import print_json
from rk_export.errors import InputError

if TYPE_CHECKING:
    from rk_export.runtime import GenerationOptions, Session

# Template arguments that the command sets itself.
_OWN = ("messages", "add_generation_prompt", "continue_final_message")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes beside the bundle and what every command on bundles takes."""
    parser.add_argument("-p", "--prompt", help="the prompt; without one, chat until Ctrl-D")
    parser.add_argument(
        "--pair", metavar="TEXT", help="with a classifier: the second text of a pair, the prompt is the first"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt through the chat template")
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="argument of the chat template, such as enable_thinking=false; may be repeated",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="most tokens of an answer (default 128)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the smallest set of that probability"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="leave out tokens below this share of the likeliest one"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 discourages repetition (default 1)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], help="stop string, special tokens included; may be repeated"
    )
    parser.add_argument(
        "--stop-token-id",
        action="append",
        default=[],
        type=int,
        metavar="ID",
        help="also end at this token; may be repeated",
    )
    parser.add_argument("--seed", type=int, help="of sampling (default: another one each time)")


def run_run(args: argparse.Namespace) -> int:
    """`run`: the text as it comes."""
    from rk_export.runtime.encoder_graph import is_encoder_bundle

    options, template_args = generation_options(args), template_arguments(args.template_arg)
    if is_encoder_bundle(args.bundle):
        from rk_export.cli.run_encoder import run_encoder

        return run_encoder(args)
    if args.pair is not None:
        raise InputError("goes with classifiers", where="--pair", fix="drop it")
    if args.prompt is not None and not args.chat:
        for name, value in (("--system", args.system), ("--template-arg", template_args)):
            if value:
                raise InputError("goes with a chat", where=name, fix="add --chat, or drop it")
    if args.prompt is None and args.json:
        raise InputError("a chat is no JSON document", where="--json", fix="give --prompt TEXT, or drop it")
    from rk_export.runtime import Session

    session = Session.from_pretrained(args.bundle, provider=args.provider, threads=args.threads)
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is None:
        from rk_export.cli.chat import Conversation, chat

        return chat(Conversation(session, options, system, template_args))
    prompt: str | list[int] = args.prompt
    if args.chat:
        prompt = session.chat_tokens([*system, {"role": "user", "content": args.prompt}], **template_args)
    if args.json:
        print_json(_generated(session, prompt, options))
        return 0
    for piece in session.stream(prompt, options):
        print(piece, end="", flush=True)
    print()
    return 0


def _generated(session: Session, prompt: str | list[int], options: GenerationOptions) -> dict[str, Any]:
    """Return a continuation, and how many tokens it took in which time; opening the bundle does not count."""
    begin = time.perf_counter()
    (found,) = session.generate([prompt], options=options)
    return {
        "text": found.text,
        "token_ids": found.token_ids,
        "finish_reason": found.finish_reason,
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": len(found.token_ids),
        "seconds": time.perf_counter() - begin,
    }


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """Return the options that the arguments stand for.

    Raises:
        InputError: One is out of its range.
    """
    from rk_export.runtime import GenerationOptions

    return GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_id),
        seed=args.seed,
    )


def template_arguments(pairs: list[str]) -> dict[str, Any]:
    """Return the template arguments that were given as KEY=JSON.

    Raises:
        InputError: A pair has no name or no JSON value, is given twice, or is one that the command sets.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(
                f"{pair!r} is no KEY=JSON", where="--template-arg", fix="write enable_thinking=false"
            )
        if key in _OWN:
            raise InputError(f"{key} is set by the command", where="--template-arg", fix="drop it")
        if key in found:
            raise InputError(f"{key} is given twice", where="--template-arg", fix="drop one")
        try:
            found[key] = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            fix = f"quote a string: {key}='\"text\"'; write true, false, null, a number, a list or an object"
            raise InputError(
                f"{text!r} is no JSON ({error})", where=f"--template-arg {key}", fix=fix
            ) from error
    return found
