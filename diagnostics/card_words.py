"""How numbers, intervals and tokens are written on a card."""

import math
from html import escape

from diagnostics.statistics import MIN_PROMPTS, Estimate


def short(value: float) -> str:
    """Three digits, two and a power of ten where it is very small or large; a minus that is one; a dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        mantissa, exponent = f"{value:.1e}".replace(".0e", "e").split("e")
        superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{'' if mantissa == '1' else mantissa + '·'}10{superscript}".replace("-", "−")
    return (f"{value:,.0f}" if size >= 1e3 else f"{value:.3g}").replace("-", "−")


def percent(value: float) -> str:
    """A share."""
    if not math.isfinite(value):
        return "–"
    return f"{short(100 * value)}\u202f%"


def counted(n: int, what: str) -> str:
    """How many of something."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def ends(e: Estimate, share: bool = False) -> str:
    """An interval, or why there is none."""
    if not math.isfinite(e.low) and not math.isfinite(e.high):
        return f"no interval: {counted(e.n_prompts, 'prompt')}" if e.n_prompts < MIN_PROMPTS else "no interval"
    show = percent if share else short
    return f"[{show(e.low)}, {show(e.high) if math.isfinite(e.high) else '∞'}]"


def running(text: str) -> str:
    """A token within running text: line breaks and tabs marked, a part of a character as a ring."""
    if not text:
        return '<span class="w">◌</span>'
    shown = escape(text)
    for what, mark in (("\r", "␍"), ("\n", "↵\n"), ("\t", "⇥")):
        shown = shown.replace(what, f'<span class="w">{mark}</span>')
    return shown


def alone(text: str) -> str:
    """A token by itself: its spaces too are to be seen."""
    for what, mark in ((" ", "▁"), ("\n", "↵"), ("\r", "␍"), ("\t", "⇥")):
        text = text.replace(what, mark)
    return f"<code>{escape(text) or '◌'}</code>"
