"""Equations as MathML, which browsers draw themselves: no script, no font, no network."""

import re

from latex2mathml.converter import convert

_FUNCTION = re.compile(r"(<mrow>|<mtd[^>]*>|/>|</m\w+>)(<mi>(?:log|ln|cos|sin)</mi>)(?!<mo[ >]|<m\w+><mo[ >]|</)")
_SPACE = '<mspace width="0.17em" />'


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


def _inline(translator, node):
    translator.body.append(_mathml(node))
    _stop()


def _display(translator, node):
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    equation = _mathml(node, display="block")
    translator.body.append(f'<div class="math notranslate nohighlight">{number}{equation}</div>\n')
    _stop()


def _mathml(node, **kwargs):
    """The equation; names of functions have thin spaces, which the converter leaves out: γ log k, not γlogk."""
    return _FUNCTION.sub(_spaced, convert(node.astext(), **kwargs))


def _spaced(match):
    before, name = match.groups()
    return before + (_SPACE if before.startswith("</") and before != "</mo>" else "") + name + _SPACE


def _stop():
    from docutils.nodes import SkipNode

    raise SkipNode
