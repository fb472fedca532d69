# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Formulas as MathML, which browsers show by themselves: nothing to load, no script."""

from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def _shown(writer: Any, node: Any, as_block: bool) -> None:
    text = node.astext()
    try:
        formula = latex2mathml.tex2mathml(text, as_block=as_block)
    except MathError as error:
        LOGGER.warning("formula %r: %s", text, error, location=node)
        formula = writer.encode(text)
    writer.body.append(f"<div>{formula}</div>" if as_block else formula)
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda writer, node: _shown(writer, node, False), None),
        block_renderers=(lambda writer, node: _shown(writer, node, True), None),
    )
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
