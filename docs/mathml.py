"""LaTeX as MathML by latex2mathml. It takes some operators for letters, which browsers set without space: these are mended."""

import re

from latex2mathml import converter

_LETTERS = re.compile(r"<mi>(&#x000B1;|&#x0007E;|:|&#x0003A;|&#x0230[AB89];|&#x027E[89];)</mi>")
_AS = {
    "&#x0007E;": "<mo>&#x0223C;</mo>",  # \sim
    **{code: f'<mo form="prefix" stretchy="false">{code}</mo>' for code in ("&#x0230A;", "&#x02308;", "&#x027E8;")},
    **{code: f'<mo form="postfix" stretchy="false">{code}</mo>' for code in ("&#x0230B;", "&#x02309;", "&#x027E9;")},
}


def convert(latex, display="inline"):
    found = converter.convert(latex, display=display)
    return _LETTERS.sub(lambda match: _AS.get(match[1], f"<mo>{match[1]}</mo>"), found)
