"""Numbers, intervals and notes of a card as text."""

import math

from diagnostics.statistics.estimate import MIN_PROMPTS, Estimate

CHOSEN = {
    "top": "Chosen by top:N for the summed KL at the even prompts of the atlas. KL, its ratio to the placebo and the rank are of the other "
    "prompts; how often it fires, activations, norms and texts are of all prompts.",
    "frequent": "Chosen by frequent:N as one that fires most often on these tokens, which biases its frequency upwards.",
}
"""Notes on latents chosen in a way that biases some of their numbers."""


def known(value: float | None) -> bool:
    """Whether it was measured and is finite."""
    return value is not None and math.isfinite(value)


def short(value: float) -> str:
    """Three digits; two and a power of ten for very small or large numbers; a dash where not finite. Minus signs are U+2212."""
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
        return f"no interval: {e.n_effective:.3g} effective prompts" if e.n_effective < MIN_PROMPTS else "no interval"
    show = percent if share else short
    return f"[{show(e.low)}, {show(e.high) if math.isfinite(e.high) else '∞'}]"
