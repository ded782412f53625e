"""Formulas as MathML, which browsers set without a script and without anything from another host."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

LOGGER = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    _write(writer, node, as_block=False)


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    _write(writer, node, as_block=True)


def _write(writer: HTML5Translator, node: nodes.TextElement, *, as_block: bool) -> None:
    formula = node.astext()
    try:
        writer.body.append(tex2mathml(formula, as_block=as_block))
    except Exception as error:  # the converter's errors differ between releases of docutils
        LOGGER.warning("cannot set the formula %s: %s", formula, error, location=node)
    raise nodes.SkipNode
