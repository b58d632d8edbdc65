"""LaTeX as MathML by latex2mathml, with the spaces that TeX sets and that browsers would not."""

import re

from latex2mathml import converter

LETTERS = re.compile(r"<mi>(&#x000B1;|&#x0007E;|:|&#x0003A;|&#x0230[AB89];|&#x027E[89];)</mi>")
"""Operators that latex2mathml takes for letters."""
OPERATORS = {
    "&#x0007E;": "<mo>&#x0223C;</mo>",  # \sim
    **{code: f'<mo form="prefix" stretchy="false">{code}</mo>' for code in ("&#x0230A;", "&#x02308;", "&#x027E8;")},
    **{code: f'<mo form="postfix" stretchy="false">{code}</mo>' for code in ("&#x0230B;", "&#x02309;", "&#x027E9;")},
}
BARS = re.compile(r'<mo((?: stretchy="false")?)>(&#x0007C;|&#x02016;)</mo>')
"""Bars of absolute values and norms, which browsers would space like binary operators."""
FUNCTIONS = re.compile(r'<(m[io])>(log|ln|exp|max|min|cos|sin)</\1>(<mo stretchy="false">&#x00028;)?')
"""Names of functions, and a bracket behind, which browsers would not space at all: γ log k, not γlogk."""


def convert(latex, display="inline"):
    """Raises ValueError for an alignment that latex2mathml does not know."""
    found = converter.convert(latex, display=display)
    if "<mi>&</mi>" in found:
        raise ValueError(f"latex2mathml knows no alignment in {latex!r}: use \\begin{{split}}")
    found = LETTERS.sub(lambda m: OPERATORS.get(m[1], f"<mo>{m[1]}</mo>"), found)
    found = BARS.sub(r'<mo\1 lspace="0em" rspace="0em">\2</mo>', found)
    return FUNCTIONS.sub(lambda m: _function(m[2], m[3] or ""), found)


def _function(name, bracket):
    return f'<mo lspace=".17em" rspace="{0 if bracket else ".17"}em">{name}</mo>{bracket}'
