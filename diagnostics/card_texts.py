"""Texts on a latent's card: every token coloured by its activation, the effect of removing the latent there as a bar beneath."""

import math
from itertools import groupby

from diagnostics.card_content import LatentCard
from diagnostics.card_words import alone, running, short
from diagnostics.latent_examples import BANDS, TOP, Example

_SIGNS = {1: "positive", -1: "negative"}


def coloured_texts(card: LatentCard) -> str:
    """The card's examples, by sign and group, with what their colours say."""
    top_z = max(abs(z) for z in card.z_range)
    known = [kl for example in card.examples for kl in example.kl if math.isfinite(kl)]
    top_kl = max(known, default=0.0)
    signs = {example.sign for example in card.examples}
    keys = [
        f'<span class="t {"p" if sign > 0 else "n"} key" style="--z:.8"></span>{_SIGNS[sign]}'
        for sign in _SIGNS
        if sign in signs
    ]
    legend = (
        f"<p class=soft>Background: z over the largest |z|, <span class=run>{' '.join(keys)}</span>. "
        "Bar under a token: the exact KL of removing z·d there, darkest for the largest shown "
        f"({short(top_kl)} nats). Outlined: the token that the text is shown for. Point at a token for its numbers. One token a prompt.</p>"
    )
    parts = [f"<h2>Texts</h2>{legend}"]
    for (sign, group), some in groupby(card.examples, key=lambda e: (e.sign, e.group)):
        name = {TOP: "Strongest", **{band: f"From the {band}" for band in BANDS}}[group].replace(
            "From the around", "Around"
        )
        what = f", {_SIGNS[sign]} z" if len(signs) > 1 else ""
        items = "".join(_example(example, top_z, top_kl) for example in some)
        parts.append(f"<h3>{name}{what}</h3><ol>{items}</ol>")
    return "".join(parts)


def _example(e: Example, top_z: float, top_kl: float) -> str:
    spans = []
    for i, (text, z, kl) in enumerate(zip(e.texts, e.z, e.kl, strict=True)):
        peak = " peak" if i == e.peak else ""
        if not z:  # what ends within a character shows where it lights up, and nowhere else
            spans.append(running(text) if text else "")
            continue
        space = (
            text[: len(text) - len(text.lstrip(" "))] if text.strip(" ") else ""
        )  # uncoloured, so that the word stands out
        title = f"z = {z:.3g}" + (f", KL = {kl:.3g} nats" if math.isfinite(kl) else ", token not counted")
        bar = f";--k:{min(1.0, math.sqrt(max(kl, 0) / top_kl)):.2f}" if math.isfinite(kl) and top_kl > 0 else ""
        style = f"--z:{min(1.0, abs(z) / top_z):.2f}{bar}"
        spans.append(
            f'{space}<span class="t {"p" if z > 0 else "n"}{peak}" style="{style}" title="{title}">{running(text[len(space) :])}</span>'
        )
    gap = "" if e.texts[0][:1].isspace() else " "
    before = f'<span class="w">…{gap}</span>' if e.start else ""
    after = '<span class="w"> …</span>' if e.stop < e.n_prompt else ""
    z, kl = e.z[e.peak], e.kl[e.peak]
    said = f"{alone(e.clean_top1)} → {alone(e.top1)}" if e.clean_top1 != e.top1 else f"{alone(e.clean_top1)}, unchanged"
    follows = f" · text goes on {alone(e.following)}" if e.following else ""
    meta = (
        f"z {short(z)} · KL {short(kl)} (placebo {short(e.kl_placebo)}) at ‖Δx‖/‖x‖ {short(e.dose)} · likeliest next {said}{follows}"
        f" · prompt {e.prompt}, token {e.position}"
    )
    return f'<li class="text"><div class="run">{before}{"".join(spans)}{after}</div><div class="meta">{meta}</div></li>'
