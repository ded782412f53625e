"""How Sphinx makes a site of the repository's pages: make docs.

The pages are written to be read on GitHub too, so they hold no directives. The navigation is made here, of the folders.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

SITE = Path(__file__).parent
ROOT = SITE.parents[1]
sys.path.insert(0, str(SITE))  # mathml

project = "rk-export"
extensions = ["myst_parser", "sphinx_copybutton", "mathml"]
include_patterns = ["README.md", "CHANGELOG.md", "docs/**.md"]
root_doc = "docs/README"
nitpicky = True  # a dead link is a warning, and warnings end the build

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_space = False
math_numfig = False
html_math_renderer = "mathml"
copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["index.html"]
html_use_index = False
html_copy_source = False
html_show_sourcelink = False

FRONT = ["README", "docs/tutorial", "docs/families"]
FOLDERS = {"How-to": "how-to", "Reference": "reference", "Explanation": "explanation", "Results": "results"}
BACK = ["docs/glossary", "CHANGELOG"]


def setup(app: Sphinx) -> None:
    """Add the navigation to the front page."""
    app.connect("source-read", _add_navigation)


def _add_navigation(_: Sphinx, name: str, source: list[str]) -> None:
    if name == root_doc:
        folders = (_toctree(title, _pages_in(folder)) for title, folder in FOLDERS.items())
        source[0] += "".join([_toctree("", FRONT), *folders, _toctree("Beside", BACK)])


def _pages_in(folder: str) -> list[str]:
    paths = (ROOT / "docs" / folder).glob("*.md")
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in paths)


def _toctree(caption: str, pages: list[str]) -> str:
    there = [f"/{page}" for page in pages if (ROOT / f"{page}.md").exists()]
    head = ["", "", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), ""]
    return "\n".join([*head, *there, "```"])
