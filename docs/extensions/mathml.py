"""Formulas as MathML, which browsers draw themselves: the site needs no network and no LaTeX."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def to_mathml(formula: str, displayed: bool = False) -> str:
    """Translate LaTeX to MathML.

    Args:
        formula: LaTeX.
        displayed: Whether it stands on a line of its own.
    """
    # docutils would put the subscript of p'_k below the prime.
    formula = re.sub(r"([a-z])'", r'\1^{\\prime}', formula)
    return tex2mathml(formula, as_block=displayed)


def _inline(translator, node: nodes.math) -> None:
    translator.body.append(to_mathml(node.astext()))
    raise nodes.SkipNode


def _displayed(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{to_mathml(node.astext(), displayed=True)}</div>')
    raise nodes.SkipNode


def setup(app) -> dict:
    """Add the renderer and select it.

    Args:
        app: Sphinx.
    """
    app.add_html_math_renderer('mathml', (_inline, None), (_displayed, None))
    app.config.html_math_renderer = 'mathml'
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
