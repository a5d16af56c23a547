"""Formulas as MathML, which browsers draw themselves: the site needs no network and no LaTeX."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

_PRIMED = 0x1400  # letters that no formula has


def to_mathml(formula: str, displayed: bool = False) -> str:
    """Translate LaTeX to MathML.

    Args:
        formula: LaTeX.
        displayed: Whether it stands on a line of its own.
    """
    # A primed letter is an Inuktitut one meanwhile. docutils would put the subscript of p'_k
    # below the prime, and browsers draw a superscript prime so small that it is overlooked.
    formula = re.sub(r"([a-z])'", lambda found: chr(_PRIMED + ord(found[1])), formula)
    # Its closing bars would be as small and as low as the subscript.
    formula = re.sub(r'(\\lVert.*?\\rVert)_', r'{\1}_', formula, flags=re.DOTALL)
    text = tex2mathml(formula, as_block=displayed)
    prime = '<mo lspace="0" rspace="0">&#8242;</mo>'
    return re.sub(
        r'<m([io])>([\u1400-\u147F])</m\1>',
        lambda found: f'<mrow><mi>{chr(ord(found[2]) - _PRIMED)}</mi>{prime}</mrow>',
        text,
    )


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
