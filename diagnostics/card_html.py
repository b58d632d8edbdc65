"""A latent's card as HTML: self-contained, for a browser or a notebook, in light and dark, on wide pages and narrow ones."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

from diagnostics.card_charts import effect_chart, norm_chart, quartile_chart, z_chart
from diagnostics.card_content import LatentCard
from diagnostics.card_style import PAGE, STYLE
from diagnostics.card_texts import coloured_texts
from diagnostics.card_words import alone, counted, ends, percent, short
from diagnostics.latent_effects import PLACEBOS, EffectSummary
from diagnostics.latent_logits import TokenLogit
from diagnostics.latent_neighbours import Neighbour
from diagnostics.results import jsonable
from diagnostics.statistics import MIN_PROMPTS

_CHOSEN = {
    "top": "Chosen by top:N for the summed KL at the even prompts of the atlas. KL, its ratio to the placebo and the rank are of the other "
    "prompts, which had no part in that; how often it fires, activations, norms and texts are of all prompts.",
    "frequent": "Chosen by frequent:N as one that fires most often on these tokens, which flatters the share of them on which it fires.",
}


def page(card: LatentCard) -> str:
    """A card as a page of its own."""
    return _page(f"{card.sae}, latent {card.latent}", card_html(card))


def index_page(cards: Sequence[LatentCard], files: Mapping[int, str]) -> str:
    """A page that leads to the files of several cards, and says of each what tells it from the others."""
    head = ("latent", "fires on", "mean |z|", "mean KL", "÷ placebo", "promotes")
    body = []
    for card in cards:
        effect = card.effects
        body.append(
            [
                f'<a href="{escape(files[card.latent])}">{card.latent}</a>',
                percent(card.frequency.value),
                "dead" if card.dead else short(card.z_mean),
                short(effect.kl.value) if effect else "–",
                short(effect.placebo_ratio.value) if effect else "–",
                " ".join(alone(t.token) for t in card.promoted[:4]),
            ]
        )
    first = cards[0]
    intro = f"<h1>{escape(first.sae)}</h1><p class=soft>{escape(first.kind)} · {escape(first.model)}, {escape(first.site)} · {_read(first)}</p>"
    table = _table(head, body) + "".join(
        f"<p class=soft>Latents {', '.join(str(card.latent) for card in some)}. {words}</p>"
        for by, words in _CHOSEN.items()
        if (some := [card for card in cards if card.chosen_by == by])
    )
    return _page(f"{first.sae}, {len(cards)} latents", f'<style>{STYLE}</style><div class="mdc">{intro}{table}</div>')


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE}</style></head><body>{body}</body></html>\n"
    )


def card_html(card: LatentCard) -> str:
    """The card as a fragment with its style sheet, as a notebook shows it."""
    parts = [_header(card), _tiles(card)]
    if card.dead:
        parts.append(
            f"<p><b>Dead on this text.</b> It is active at none of {card.n_tokens:,} tokens"
            + (f" that count (at {card.active_left_out:,} of those left out)" if card.active_left_out else "")
            + ": nothing can be said of when it fires, and of its effect only what its direction says by itself.</p>"
        )
    else:
        parts += [_charts(card), coloured_texts(card)]
    parts += [_logits(card), _neighbours(card.neighbours), _footer(card)]
    return f'<div class="mdc"><style>{STYLE}</style>{"".join(parts)}</div>'


def _header(card: LatentCard) -> str:
    return (
        f"<header><h1>Latent {card.latent}</h1>"
        f"<p class=soft>of {card.d_sae:,} in <b>{escape(card.sae)}</b> ({escape(card.kind)}) · {escape(card.model)}, "
        f"{escape(card.site)} · {_read(card)}</p>"
        + (f"<p class=soft>{_CHOSEN[card.chosen_by]}</p>" if card.chosen_by in _CHOSEN else "")
        + "</header>"
    )


def _read(card: LatentCard) -> str:
    text = card.provenance["text"]
    return (
        f"{card.n_tokens:,} tokens of {card.provenance['prompts']:,} prompts ({escape(str(text.get('name', 'given')))})"
    )


def _tiles(card: LatentCard) -> str:
    low, high = card.z_range
    few = card.frequency.n_prompts < MIN_PROMPTS
    tiles = [
        ("fires on", percent(card.frequency.value), "too few prompts for an interval" if few else ends(card.frequency, True)),
        ("mean |z| where active", short(card.z_mean), "" if card.dead else f"from {short(low)} to {short(high)}"),
        ("⟨w, d⟩, encoder and decoder", short(card.alignment), f"cosine {short(card.alignment_cosine)}, ‖d‖ {short(card.decoder_norm)}"),
    ]  # fmt: skip
    if card.learned_a is not None:
        tiles.append(("exponent of ‖x‖, learned", short(card.learned_a), "0 cosine, 1 inner product"))
    if card.effects is not None:
        tiles += _effect_tiles(card.effects)
    if card.atlas is not None and card.atlas["rank"] is not None:
        share = f"{percent(card.atlas['share_of_effect'])} of the summed KL of {card.atlas['latents']:,} latents"
        where = ", prompts that did not choose it" if card.chosen_by == "top" else ""
        tiles.append(("rank by total effect", str(card.atlas["rank"]), share + where))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _effect_tiles(e: EffectSummary) -> list[tuple[str, str, str]]:
    bound = "≥ " if e.placebo_ratio.bound else ""
    return [
        ("KL of removing it, nats", short(e.kl.value), f"{ends(e.kl)} at ‖Δx‖/‖x‖ {short(e.dose.value)}"),
        ("÷ placebo", bound + short(e.placebo_ratio.value), ends(e.placebo_ratio)),
        ("carried directly, nats", short(e.kl_direct.value), ends(e.kl_direct)),
        ("top-1 token changes", percent(e.top1_changed.value), ends(e.top1_changed, True)),
        ("effect on top tenth by |z|", percent(e.top_tenth.value), f"{ends(e.top_tenth, True)}; of ‖Δx‖²: {percent(e.top_tenth_dose)}"),
    ]  # fmt: skip


def _charts(card: LatentCard) -> str:
    charts = [
        (z_chart(card.z_histogram), f"Activation at the {card.n_active:,} tokens where it is active."),
        (norm_chart(card.norm_histograms), "Norm of the activation: line where it is active, grey all tokens."),
        (quartile_chart(card.quartile_shares), "Share of its firing by quartile of ‖x‖. Dashed: what indifference to the norm gives."),
        (effect_chart(card.effect_rows), f"Exact effect at {len(card.effect_rows):,} tokens drawn uniformly; rings: mean placebo at the same token."),
    ]  # fmt: skip
    shown = "".join(f"<figure>{svg}<figcaption>{words}</figcaption></figure>" for svg, words in charts if svg)
    note = (
        "Active at none of the prompts that did not choose it, so nothing is said of its effect."
        if card.effects is None
        else _effect_note(card, card.effects)
    )
    return f'<h2>When it fires, and what removing it does</h2><div class="charts">{shown}</div><p class=soft>{note}</p>'


def _effect_note(card: LatentCard, e: EffectSummary) -> str:
    top = card.chosen_by == "top"
    rows = f"{e.kl.n_rows:,} active tokens drawn uniformly" + (" at the prompts that did not choose it" if top else "")
    if e.source == "atlas":
        assert card.atlas is not None
        joined = card.atlas["prompts_joined_and_held_back" if top else "prompts_joined"]
        rows = (
            f"its {counted(e.kl.n_rows, 'row')} at the {counted(joined, 'joined prompt')}"
            + " that did not choose it" * top
        )
    floor = f"Noise floor {short(e.noise_floor)} nats. " if math.isfinite(e.noise_floor) else ""
    return (
        f"Effects: KL(clean ‖ z·d subtracted at the token, reconstruction error kept) of the next-token distribution, mean over {rows}. "
        f"Placebo: same ‖Δx‖ and angle to x, towards the difference of two other tokens' activations, mean of {PLACEBOS} draws ({e.kl_placebo.n_rows:,} tokens, "
        f"mean {short(e.kl_placebo.value)} {ends(e.kl_placebo)}); ÷ placebo is the ratio of the two means there, not the selectivity "
        f"of feature ablation, intended/(intended + collateral), which takes a labelled concept. {floor}"
        f"Brackets and bars: 95 % intervals, delete-one-prompt jackknife over {counted(e.kl.n_prompts, 'prompt')}."
    )


def _logits(card: LatentCard) -> str:
    of = "z = 1, as it never fires here" if card.dead else f"z = {short(card.z_mean)}, the mean |z|"
    top = max((abs(t.logit) for t in (*card.promoted, *card.suppressed)), default=0.0)
    both = "".join(
        f"<div><h3>{what}</h3>{_logit_table(some, top)}</div>"
        for what, some in (("Promotes", card.promoted), ("Suppresses", card.suppressed))
    )
    note = (
        f"Logits that z·d adds for {of}: W<sub>U</sub>(g ∘ d), less the mean over the vocabulary, with the final norm's gain g and its scale held "
        "at the median token's, later blocks left out. What later blocks make of it is in the exact effects alone."
    )
    return f'<h2>What its decoder direction says by itself</h2><div class="pair">{both}</div><p class=soft>{note}</p>'


def _logit_table(tokens: Sequence[TokenLogit], top: float) -> str:
    rows = []
    for token, logit in tokens:
        width = 100 * abs(logit) / top if top else 0
        meter = f'<span class="meter{" neg" if logit < 0 else ""}" style="width:{width:.0f}%"></span>'
        rows.append(
            f'<tr><td>{alone(token)}</td><td>{f"{logit:+.3f}".replace("-", "−")}</td><td class="grow">{meter}</td></tr>'
        )
    return f"<table><thead><tr><th scope=col>token</th><th scope=col>logit</th><th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _neighbours(neighbours: Sequence[Neighbour]) -> str:
    if not neighbours:
        return ""
    head = ("SAE", "latent", "cosine of decoders", "correlation of activations", "fires on", "nearest by")
    body = [
        [escape(n.sae), str(n.latent), short(n.cosine), short(n.correlation), percent(n.frequency), n.nearest]
        for n in neighbours
    ]
    note = "The largest of all latents of each SAE, so that chance alone gives some size; each SAE reads its own site."
    return f"<h2>Nearest latents</h2>{_table(head, body)}<p class=soft>{note}</p>"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    columns = "".join(f"<th scope=col>{name}</th>" for name in head)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>'


def _footer(card: LatentCard) -> str:
    p = card.provenance
    text = p["text"]
    left = "; ".join(f"{reason} {n:,}" for reason, n in p["tokens_left_out"].items()) or "none"
    delta = p["replay_delta"]
    how = f"by {p['path']}" if p["path"] else "none measured"
    exact = (
        f", logits within {short(delta)} of full forward passes" if delta is not None and math.isfinite(delta) else ""
    )
    sink = f"‖x‖ > {p['sink_filter']:g} × median" if p["sink_filter"] else "none"
    facts = [
        f"Text: {text.get('name', 'given')}, licence: {text.get('licence', 'unknown: as given')}.",
        f"Model {p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}), weights {p['weights_sha256'][:12]}…; SAE {p['sae']['sha256']}.",
        f"Seed {p['seed']}; sink filter: {sink}; tokens left out: {left}; active at {card.active_left_out:,} of these.",
        f"Effects {how}{exact}; not finite: {p['effects_not_finite']}, placebos that do not exist: {p['placebos_that_do_not_exist']}.",
    ]
    if card.atlas is not None:
        a = card.atlas
        again = (
            f", differs by at most {short(a['largest_difference'])} nats at {a['measured_again']} tokens measured again"
            if a["measured_again"]
            else ""
        )
        facts.append(
            f"Atlas: {a['rows_of_latent']:,} rows of this latent at the {card.n_active:,} active tokens ({a['prompts_joined']} of {a['prompts']} prompts joined; not finite: {a['rows_not_finite']}){again}."
        )  # fmt: skip
    whole = escape(json.dumps(jsonable(p), indent=1, ensure_ascii=False))
    lines = "".join(f"<p>{escape(fact)}</p>" for fact in facts)
    return f'<h2>How it was made</h2><div class="soft">{lines}</div><details><summary>Provenance</summary><pre>{whole}</pre></details>'
