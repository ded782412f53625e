"""Texts to measure perplexity on and to calibrate with, fetched on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from assets import wheels
from assets.wheels import Wheel, fetch, made_whole, verify
from assets.wiki import eval_and_calibration

_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
GENSIM = Wheel(
    "gensim",
    "4.4.0",
    "gensim/test/test_data",
    {
        _DUMP: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        _NEWS: "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    },
    fallback=(
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
        *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
    ),
)
_WIKI = {
    "eval": ("wiki_eval.txt", "7fffa3e37237299bf1eb5053430fe190b2a44ed3c891f50bf66fc4146746bdf2"),
    "calib": ("wiki_calib.txt", "43f016dc50ab47ba102014c2aa4c81656558f66251ed306f0020e521e4abb30c"),
}


def news_text() -> Path:
    """Return a file of plain news prose, one story a line."""
    return fetch(GENSIM) / _NEWS


def wiki_text(split: Literal["eval", "calib"]) -> Path:
    """Return English Wikipedia prose (CC BY-SA): ``eval`` has 240 kB, ``calib`` 1.4 MB from other articles.

    Raises:
        InputError: mwparserfromhell is missing, or its version prepares another text than the pinned one.
    """
    folder = wheels.CACHE.expanduser() / "wiki"
    if not folder.is_dir():
        _prepare_wiki(folder)
    return folder / _WIKI[split][0]


def _prepare_wiki(folder: Path) -> None:
    prepared = eval_and_calibration(fetch(GENSIM) / _DUMP)
    with made_whole(folder) as partial:
        for text, (name, digest) in zip(prepared, _WIKI.values(), strict=True):
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
            verify(partial / name, digest, "install mwparserfromhell 0.7")
