"""Equations as MathML, which browsers draw themselves: no script, no font, no network."""

from mathml import convert


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


def _inline(translator, node):
    translator.body.append(convert(node.astext()))
    _stop()


def _display(translator, node):
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    equation = convert(node.astext(), display="block")
    translator.body.append(f'<div class="math notranslate nohighlight">{number}{equation}</div>\n')
    _stop()


def _stop():
    from docutils.nodes import SkipNode

    raise SkipNode
