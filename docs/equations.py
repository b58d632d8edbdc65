"""Equations as MathML, which browsers draw themselves: no script, no font, no network."""

import re

from latex2mathml.converter import convert

BARS = re.compile(r'<mo((?: stretchy="false")?)>(&#x0007C;|&#x02016;)</mo>')
"""Bars of absolute values and norms, which browsers would space like binary operators."""
FUNCTIONS = re.compile(r'<(m[io])>(log|ln|exp|max|min|cos|sin)</\1>(<mo stretchy="false">&#x00028;)?')
"""Names of functions, and a bracket behind, which browsers would not space at all: γ log k, not γlogk."""


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


def _inline(translator, node):
    translator.body.append(_mathml(node.astext(), "inline"))
    _stop()


def _display(translator, node):
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    parts = "".join(f"<span>{_mathml(part, 'block')}</span>" for part in _side_by_side(node.astext()))
    translator.body.append(f'<div class="math notranslate nohighlight">{number}{parts}</div>\n')
    _stop()


def _side_by_side(latex):
    r"""Equations with `\qquad` between them, one by one: they stand below each other where they do not fit on a line."""
    parts = [part for part in latex.split(r"\qquad") if part.strip()]
    whole = all(part.count(a) == part.count(b) for part in parts for a, b in (("{", "}"), (r"\begin", r"\end")))
    return parts if whole else [latex]


def _mathml(latex, display):
    found = convert(latex, display=display)
    if "<mi>&</mi>" in found:
        raise ValueError(f"latex2mathml knows no alignment in {latex!r}: use \\begin{{split}}")
    found = BARS.sub(r'<mo\1 lspace="0em" rspace="0em">\2</mo>', found)
    return FUNCTIONS.sub(lambda m: _function(m[2], m[3] or ""), found)


def _function(name, bracket):
    return f'<mo lspace=".17em" rspace="{0 if bracket else ".17"}em">{name}</mo>{bracket}'


def _stop():
    from docutils.nodes import SkipNode

    raise SkipNode
