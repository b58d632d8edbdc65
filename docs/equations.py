"""Equations as MathML, which browsers draw themselves: no script, no font, no network."""

import re

from latex2mathml.converter import convert

# latex2mathml sets functions without the thin spaces that TeX puts around them: γ log k, not γlogk.
FUNCTION = r"\\(?:log|ln|exp|max|min|cos|sin)(?![A-Za-z])"
AFTER = re.compile(
    rf"({FUNCTION})\s*(?=[A-Za-z]|\\(?!(?:[Bb]ig|left|right|[lr]Vert|[lr]vert|[lr]angle|[lr]floor))[A-Za-z])"
)
BEFORE = re.compile(rf"(?<=[\w}})])(?<!\\cdot)(?<!\\lvert)(?<!\\langle)\s*(?={FUNCTION})")


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))


def _inline(translator, node):
    translator.body.append(convert(spaced(node.astext())))
    _stop()


def _display(translator, node):
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    parts = "".join(f"<span>{convert(part, display='block')}</span>" for part in side_by_side(spaced(node.astext())))
    translator.body.append(f'<div class="math notranslate nohighlight">{number}{parts}</div>\n')
    _stop()


def spaced(tex):
    """The same formula with thin spaces around function names, and with `aligned` as `align*`, which latex2mathml knows."""
    tex = tex.replace("{aligned}", "{align*}")
    return BEFORE.sub(r"\\,", AFTER.sub(r"\1\\,", tex))


def side_by_side(tex):
    r"""Formulas that `\qquad` separates, one each, so that a narrow screen can put them below one another."""
    parts = [part.strip() for part in re.split(r"\\qquad(?![A-Za-z])", tex)]
    whole = r"\begin" in tex or any(part.count("{") != part.count("}") for part in parts)
    return [tex] if whole else [part for part in parts if part]


def _stop():
    from docutils.nodes import SkipNode

    raise SkipNode
