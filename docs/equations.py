"""Equations as MathML, which browsers draw themselves: no script, no font, no network."""

from mathml import convert


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


def _inline(translator, node):
    translator.body.append(convert(node.astext()))
    _stop()


def _display(translator, node):
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    parts = "".join(f"<span>{convert(part, 'block')}</span>" for part in _side_by_side(node.astext()))
    translator.body.append(f'<div class="math notranslate nohighlight">{number}{parts}</div>\n')
    _stop()


def _side_by_side(latex):
    r"""Equations with `\qquad` between them, one by one: they stand below each other where they do not fit on a line."""
    parts = [part for part in latex.split(r"\qquad") if part.strip()]
    whole = all(part.count(a) == part.count(b) for part in parts for a, b in (("{", "}"), (r"\begin", r"\end")))
    return parts if whole else [latex]


def _stop():
    from docutils.nodes import SkipNode

    raise SkipNode
