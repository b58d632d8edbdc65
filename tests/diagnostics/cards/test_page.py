"""Pages of cards are valid and self-contained, escape all text, and show the card's numbers."""

import re
from dataclasses import replace

import numpy as np
import pytest

from diagnostics.cards.charts import effect_chart, norm_chart, quartile_chart, z_chart
from diagnostics.cards.content import Histogram
from diagnostics.cards.page import card_html, index_page, page
from diagnostics.cards.run import latent_cards
from diagnostics.cards.words import ends, percent, short
from diagnostics.statistics.estimate import Estimate
from interventions import wrap
from interventions.direct_logits import TokenLogit
from tests.cards import DEAD, OPTIONS, PROMPTS, Table, cards, sae
from tests.pages import read
from tests.reports import EVIL
from tests.tiny import fresh, tokenizer


@pytest.fixture(scope="module")
def card():
    return cards([7], others={"b": sae(seed=4)}, atlas=Table(sae(), [2, 7]))[0]


@pytest.fixture(scope="module")
def every(card):
    return {"live": card, "dead": cards([DEAD])[0], "signed": cards([7], sae=sae(signed=True))[0]}


@pytest.mark.parametrize("kind", ["live", "dead", "signed"])
def test_pages_are_valid_and_self_contained(every, kind):
    html = page(every[kind])
    found = read(html)
    assert found.loads == [] and not re.search(r"https?:|url\(|@import|<script|<link", html)
    assert html.startswith("<!DOCTYPE html>") and "viewport" in html and '<meta charset="utf-8">' in html
    assert found.tags.count("svg") == (0 if kind == "dead" else 4)
    assert every[kind]._repr_html_() == card_html(every[kind]) and every[kind]._repr_html_() in html
    assert ("Dead on this text" in found.words) == (kind == "dead") == ("Texts" not in found.text)
    groups = {"live": ["Strongest"], "dead": [], "signed": ["Strongest, positive z", "Strongest, negative z"]}
    assert [words for words in found.text if words.startswith("Strongest")] == groups[kind]
    colours = {name.split()[1] for name in found.of("span", "class") if name.startswith("t ")}
    assert colours == {"live": {"p"}, "dead": set(), "signed": {"p", "n"}}[kind]


def test_the_page_shows_the_numbers_of_the_card(card):
    found = read(page(card))
    for words in ("Latent 7", short(card.effects.kl.value), ends(card.effects.kl), percent(card.frequency.value), "Nearest latents",
                  "licence: unknown", f"prompt {card.examples[0].prompt}, token {card.examples[0].position}", "rank by total effect",
                  card.provenance["weights_sha256"][:12], "logits within", "Atlas:", "nats. Brackets and bars: 95 % intervals",
                  f"its {card.n_active} rows at the 24 joined prompts", "not the selectivity of feature ablation"):  # fmt: skip
        assert words in found.words, words
    example = card.examples[0]
    z = example.z[example.peak]
    at = found.of("span", "title").index(f"z = {z:.3g}, KL = {example.kl[example.peak]:.3g} nats")
    share = min(1, abs(z) / max(abs(end) for end in card.z_range))
    assert found.of("span", "style")[at].startswith(f"--z:{share:.2f};--k:")
    assert "".join(example.texts).strip() in "".join(found.text)


def test_texts_names_and_tokens_are_escaped_once(card):
    example = card.examples[0]
    texts = (EVIL,) * len(example.texts)
    evil = replace(
        card,
        sae=EVIL,
        model=EVIL,
        examples=(replace(example, texts=texts, clean_top1=EVIL, top1=EVIL + "2", following=EVIL),),
        promoted=(TokenLogit(EVIL, 1.0),),
        neighbours=(replace(card.neighbours[0], sae=EVIL),),
        provenance=card.provenance | {"text": {"name": EVIL, "licence": EVIL}, "model": EVIL},
    )
    for html in (page(evil), index_page([evil], {7: 'a"b.html'})):
        found = read(html)
        assert "script" not in found.tags and "".join(found.text).count(EVIL) >= 3
        assert EVIL.replace(" ", "▁") in found.text  # as a token by itself
    assert found.loads == ['a"b.html']


def test_spaces_and_line_breaks_of_tokens_are_shown(card):
    texts = ("a\n", "", " b", "\t", "  ", "\r")
    where = {"position": 2, "start": 0, "stop": 6, "n_prompt": 6}
    numbers = {"z": (1.0, 1.0, 2.0, 0.0, 1.0, 1.0), "kl": (0.1,) * 6}
    example = replace(card.examples[0], texts=texts, clean_top1=" a\n<", top1="", **where, **numbers)
    html = card_html(replace(card, examples=(example,)))
    run = re.findall(r'<div class="run">(.*?)</div>', html, re.DOTALL)[0]
    marked = ('a<span class="w">↵\n</span>', '<span class="w">◌</span>', "b", None, "  ", '<span class="w">␍</span>')
    shown = [words for words in marked if words is not None]
    assert re.findall(r'title="[^"]*">(.*?)</span>(?=<span class="[tw]| |$)', run, re.DOTALL) == shown
    assert ' <span class="t p peak"' in run and '</span><span class="w">⇥</span><span class="t p"' in run
    assert "<code>▁a↵&lt;</code> → <code>◌</code>" in html


def test_index_page(every):
    files = {7: "latent_7.html", DEAD: "latent_5.html"}
    found = read(index_page([every["live"], every["dead"]], files))
    assert found.loads == list(files.values()) and "dead" in found.text and "Chosen by" not in found.words
    by_frequency = index_page([replace(every["live"], chosen_by="frequent")], files)
    assert read(by_frequency).words.count("Latents 7. Chosen by frequent:N") == 1


def test_ids_without_a_token_are_shown_as_ids():
    """Where the unembedding is wider than the tokenizer."""
    models = (wrap(fresh("llama"), tokenizer(n), name="tiny") for n in (60, 97))
    narrow, wide = (latent_cards(model, sae(), [7], PROMPTS, **OPTIONS)[0] for model in models)
    for found, known in ((narrow.promoted, wide.promoted), (narrow.suppressed, wide.suppressed)):
        assert [t.token for t in found] == [t.token if (i := int(t.token[1:])) < 60 else f"⟨{i}⟩" for t in known]
    shown = [x for e in narrow.examples for x in (*e.texts, e.top1, e.clean_top1)]
    assert any("⟨" in x for x in shown) and any("w" in x for x in shown)
    words = read(card_html(narrow)).words
    assert all(t.token in words for t in (*narrow.promoted, *narrow.suppressed))


def test_heights_of_bars_are_proportional_to_counts():
    svg = z_chart(Histogram(np.array([-2.0, -1, 0, 1, 2]), np.array([1, 0, 4, 2])))
    bars = read(svg)
    heights = [float(height) for height in bars.of("rect", "height")]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 4, 2], rel=0.01)
    assert bars.of("rect", "class") == ["bar neg", "bar pos", "bar pos"] and "z 0 to 1: 4 tokens" in bars.text
    even = Histogram(np.geomspace(1, 10, 5), np.full(4, 0.25))
    assert len(set(read(norm_chart((even, even))).of("rect", "height"))) == 1


def test_empty_charts_are_valid():
    nothing = Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0)
    for svg in (quartile_chart([nothing] * 4), z_chart(Histogram(np.array([0.0, 1.0]), np.array([0])))):
        assert read(svg).tags.count("rect") == 0 and "nan" not in svg


def test_effects_and_placebos_are_drawn(card):
    svg = effect_chart(card.effect_rows)
    assert svg.count('class="dot pos"') == svg.count('class="placebo"') == card.n_active
    assert effect_chart(card.effect_rows.iloc[:0]) == ""
    one = effect_chart(card.effect_rows.iloc[:1].assign(kl=0.0))
    assert "nan" not in one + svg and read(one).tags.count("circle") == 2
    assert all(0 <= float(y) <= 200 for y in read(svg).of("circle", "cy"))


def test_numbers_and_intervals_as_text():
    assert [short(x) for x in (0.0, -0.12345, 1234.5, 4.96e-4, 1e-4, -2e7, np.nan, np.inf)] == [
        *("0", "−0.123", "1,234", "5·10⁻⁴", "10⁻⁴", "−2·10⁷", "–", "–")
    ]
    assert percent(0.5) == "50\u202f%" and percent(np.nan) == "–"
    assert ends(Estimate(1, 0.5, np.inf, 1, 9, 12)) == "[0.5, ∞]"
    reasons = {4.25: "no interval: 4.25 effective prompts", 40.0: "no interval"}
    assert {n: ends(Estimate(1, np.nan, np.nan, np.nan, 9, 40, n_effective=n)) for n in reasons} == reasons
