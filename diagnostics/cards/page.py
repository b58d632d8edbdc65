"""A latent's card as self-contained HTML, for browsers and notebooks."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from diagnostics.cards import words
from diagnostics.cards.charts import effect_chart, norm_chart, quartile_chart, z_chart
from diagnostics.cards.content import CardContent
from diagnostics.cards.effects import PLACEBOS, EffectSummary
from diagnostics.cards.examples import TOP, Example
from diagnostics.cards.words import counted, ends, known, percent, short
from diagnostics.results.templates import render
from diagnostics.statistics.estimate import MIN_PROMPTS
from interventions.files import jsonable

_SIGNS = {1: "positive", -1: "negative"}
_GROUPS = {TOP: "Strongest", "upper quarter": "From the upper quarter", "around the median": "Around the median"}


def page(card: CardContent) -> str:
    """A card as a page of its own."""
    return render("cards/page.html", **_values(card))


def card_html(card: CardContent) -> str:
    """The card as an HTML fragment with its style sheet, for notebooks."""
    return render("cards/card.html", **_values(card))


def index_page(cards: Sequence[CardContent], files: Mapping[int, str]) -> str:
    """A page that links the files of several cards, with the main numbers of each."""
    return render("cards/index.html", cards=cards, files=files, words=words)


def _values(card: CardContent) -> dict[str, Any]:
    logits = [abs(t.logit) for t in (*card.promoted, *card.suppressed)]
    return {
        "card": card,
        "words": words,
        "tiles": _tiles(card),
        "charts": () if card.dead else _charts(card),
        "placebos": PLACEBOS,
        "effects_rows": _effect_rows(card, card.effects) if card.effects else "",
        "texts": _texts(card),
        "largest_logit": max(logits, default=0.0),
        "facts": _facts(card),
        "provenance": json.dumps(jsonable(card.provenance), indent=1, ensure_ascii=False),
    }


def _tiles(card: CardContent) -> list[tuple[str, str, str]]:
    """Name, value and the line below it."""
    low, high = card.z_range
    few = card.frequency.n_effective < MIN_PROMPTS
    tiles = [
        ("fires on", percent(card.frequency.value), "too few prompts for an interval" if few else ends(card.frequency, True)),
        ("mean |z| where active", short(card.z_mean), "" if card.dead else f"from {short(low)} to {short(high)}"),
        ("⟨w, d⟩, encoder and decoder", short(card.alignment), f"cosine {short(card.alignment_cosine)}, ‖d‖ {short(card.decoder_norm)}"),
    ]  # fmt: skip
    if card.learned_a is not None:
        tiles.append(("exponent of ‖x‖, learned", short(card.learned_a), "0 cosine, 1 inner product"))
    if e := card.effects:
        bound = "≥ " if e.placebo_ratio.bound else ""
        tiles += [
            ("median KL of removing it, nats", short(e.kl.value), f"{ends(e.kl)} at ‖Δx‖/‖x‖ {short(e.dose.value)}"),
            ("÷ placebo (median)", bound + short(e.placebo_ratio.value), ends(e.placebo_ratio)),
            ("carried directly, nats", short(e.kl_direct.value), ends(e.kl_direct)),
            ("top-1 token changes", percent(e.top1_changed.value), ends(e.top1_changed, True)),
            ("effect on top tenth by |z|", percent(e.top_tenth.value), f"{ends(e.top_tenth, True)}; of ‖Δx‖²: {percent(e.top_tenth_dose)}"),
        ]  # fmt: skip
    if card.atlas is not None and card.atlas["rank"] is not None:
        share = f"{percent(card.atlas['share_of_effect'])} of the summed KL of {card.atlas['latents']:,} latents"
        where = ", prompts that did not choose it" if card.chosen_by == "top" else ""
        tiles.append(("rank by total effect", str(card.atlas["rank"]), share + where))
    return tiles


def _charts(card: CardContent) -> list[tuple[Markup, str]]:
    """Charts and their captions."""
    return [
        (z_chart(card.z_histogram), f"Activation at the {card.n_active:,} tokens where it is active."),
        (norm_chart(card.norm_histograms), "Norm of the activation: line where it is active, grey all tokens."),
        (quartile_chart(card.quartile_shares), "Share of its firing by quartile of ‖x‖. Dashed: a latent that does not depend on the norm."),
        (effect_chart(card.effect_rows), f"Exact effect at {len(card.effect_rows):,} tokens drawn uniformly; rings: mean placebo at the same token."),
    ]  # fmt: skip


def _effect_rows(card: CardContent, e: EffectSummary) -> str:
    """The rows that the effect is over."""
    top = card.chosen_by == "top"
    if e.source == "atlas":
        assert card.atlas is not None
        joined = card.atlas["prompts_joined_and_held_back" if top else "prompts_joined"]
        of = f"its {counted(e.kl.n_rows, 'row')} at the {counted(joined, 'joined prompt')}"
        return of + " that did not choose it" * top
    return f"{e.kl.n_rows:,} active tokens drawn uniformly" + " at the prompts that did not choose it" * top


def _texts(card: CardContent) -> dict[str, Any]:
    """The card's examples by sign and group: tokens coloured by activation, with the effect of removing the latent as a bar."""
    largest_z = max(abs(z) for z in card.z_range)
    largest_kl = max((kl for example in card.examples for kl in example.kl if known(kl)), default=0.0)
    signs = {sign: name for sign, name in _SIGNS.items() if any(e.sign == sign for e in card.examples)}
    groups = [
        (
            _GROUPS[group] + (f", {_SIGNS[sign]} z" if len(signs) > 1 else ""),
            [(example, list(_spans(example, largest_z, largest_kl))) for example in some],
        )
        for (sign, group), some in groupby(card.examples, key=lambda e: (e.sign, e.group))
    ]
    return {"signs": signs, "largest_kl": largest_kl, "groups": groups}


def _spans(e: Example, largest_z: float, largest_kl: float) -> Iterator[dict[str, Any]]:
    for i, (text, z, kl) in enumerate(zip(e.texts, e.z, e.kl, strict=True)):
        if not z:  # what ends within a character shows where it lights up, and nowhere else
            yield {"active": False, "word": text}
            continue
        word = text.lstrip(" ") or text  # spaces before it are uncoloured, so that the word stands out
        bar = f";--k:{min(1.0, math.sqrt(max(kl, 0) / largest_kl)):.2f}" if known(kl) and largest_kl > 0 else ""
        yield {
            "active": True,
            "space": text[: len(text) - len(word)],
            "word": word,
            "kind": ("p" if z > 0 else "n") + " peak" * (i == e.peak),
            "style": f"--z:{min(1.0, abs(z) / largest_z):.2f}{bar}",
            "title": f"z = {z:.3g}, " + (f"KL = {kl:.3g} nats" if known(kl) else "token not counted"),
        }


def _facts(card: CardContent) -> list[str]:
    """How the card was made."""
    p = card.provenance
    text = p["text"]
    left = "; ".join(f"{reason} {n:,}" for reason, n in p["tokens_left_out"].items()) or "none"
    how = f"by {p['path']}" if p["path"] else "none measured"
    exact = f", logits within {short(p['replay_delta'])} of full forward passes" if known(p["replay_delta"]) else ""
    sink = f"‖x‖ > {p['sink_filter']:g} × median" if p["sink_filter"] else "none"
    facts = [
        f"Text: {text.get('name', 'given')}, licence: {text.get('licence', 'unknown: as given')}.",
        f"Model {p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}), weights {p['weights_sha256'][:12]}…; SAE {p['sae']['sha256']}.",
        f"Seed {p['seed']}; sink filter: {sink}; tokens left out: {left}; active at {card.active_left_out:,} of these.",
        f"Effects {how}{exact}; not finite: {p['effects_not_finite']}, placebos that do not exist: {p['placebos_that_do_not_exist']}.",
    ]
    if a := card.atlas:
        again = (
            f", differs by at most {short(a['largest_difference'])} nats at {a['measured_again']} tokens measured again"
            if a["measured_again"]
            else ""
        )
        facts.append(
            f"Atlas: {a['rows_of_latent']:,} rows of this latent at the {card.n_active:,} active tokens "
            f"({a['prompts_joined']} of {a['prompts']} prompts joined; not finite: {a['rows_not_finite']}){again}."
        )
    return facts
