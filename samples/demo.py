"""The whole way on a real model, in the commands that a user types: compress, compare, ask.

``make demo`` runs this on SmolLM2-135M-Instruct, which is fetched on first use. Everything that is made lies in
one folder, ``out/demo`` unless ``--out`` says otherwise.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from assets import smollm2, wiki_text

from rk_export import RkExportError

QUESTION = "Where is the Eiffel Tower?"
COMMAND = (sys.executable, "-m", "rk_export.cli.main")


def commands(args: argparse.Namespace, model: Path, text: Path) -> Iterator[tuple[list[str], bool]]:
    """Yield each command, and whether its results are shown."""
    out: Path = args.out
    yield ["compress", str(model), "-o", str(out / "default")], False
    yield ["compress", str(model), "-o", str(out / args.size), "--size", args.size], False
    yield ["compress", str(model), "-o", str(out / "w8a8"), "--recipe", "w8a8"], False
    yield ["export", str(model), "-o", str(out / "dense")], False
    bundles = [str(out / name) for name in ("dense", "default", args.size, "w8a8")]
    measured = ["--text", str(text), "--tokens", str(args.tokens), "--context", str(args.context), "--speed"]
    yield ["compare", *bundles, *measured, "-o", str(out / "compare.html")], True
    yield ["run", str(out / "default"), "--chat", "-p", args.question], True


def type_in(words: list[str], *, shown: bool, threads: int) -> None:
    """Run one command as if it were typed; its bars appear, its results if they are to be shown."""
    print(f"\n$ rk-export {shlex.join(words)}", flush=True)
    replaces = [] if words[0] == "run" else ["--force"]
    subprocess.run(
        [*COMMAND, *words, *replaces, "--threads", str(threads)],
        check=True,
        stdout=None if shown else subprocess.DEVNULL,
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a chat model's folder; None fetches SmolLM2-135M-Instruct"
    )
    parser.add_argument("--text", type=Path, help="text for perplexity; None fetches Wikipedia prose")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for everything that is made"
    )
    parser.add_argument("--size", default="90MB", help="size of the second bundle")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--context", type=int, default=512, help="tokens in a window of the text")
    parser.add_argument("--tokens", type=int, default=2560, help="tokens of the text that are used")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    args, start = parse(arguments), time.perf_counter()
    try:
        model, text = args.model or smollm2(), args.text or wiki_text("eval")
        for words, shown in commands(args, model, text):
            type_in(words, shown=shown, threads=args.threads)
    except RkExportError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(f"\nreport      {args.out / 'default' / 'report.html'}\ncomparison  {args.out / 'compare.html'}")
    print(f"ask it      rk-export run {args.out / 'default'} --chat -p '...'")
    print(f"time        {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
