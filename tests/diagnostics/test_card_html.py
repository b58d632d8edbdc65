"""The page: whole, safe, self-contained, and it says what the card says."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from diagnostics.card_charts import effect_chart, norm_chart, quartile_chart, z_chart
from diagnostics.card_content import Histogram
from diagnostics.card_html import card_html, index_page, page
from diagnostics.card_words import alone, ends, percent, running, short
from diagnostics.cards import latent_cards
from diagnostics.latent_logits import TokenLogit
from diagnostics.statistics import Estimate
from interventions import wrap
from tests.cards import DEAD, OPTIONS, PROMPTS, Table, cards, reworded, sae
from tests.tiny import fresh, tokenizer

VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = "<script>alert(\"1\")</script> & 'x'"


class Balanced(HTMLParser):
    """Every tag closed, in order; keeps what is asked about."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text, self.titles = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        self.titles += [value for name, value in attrs if name == "title"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-1:]}"

    def handle_data(self, data):
        self.text.append(data)


def read(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def card():
    return cards([7], others={"b": sae(seed=4)}, atlas=Table(sae(), [2, 7]))[0]


@pytest.fixture(scope="module")
def every(card):
    return {"live": card, "dead": cards([DEAD])[0], "signed": cards([7], sae=sae(signed=True))[0]}


@pytest.mark.parametrize("kind", ["live", "dead", "signed"])
def test_pages_are_whole_and_need_nothing_from_elsewhere(every, kind):
    html = page(every[kind])
    found = read(html)
    assert found.links == [] and not re.search(r"https?:|url\(|@import|<script|<link", html)
    assert html.startswith("<!DOCTYPE html>") and "viewport" in html and '<meta charset="utf-8">' in html
    assert (found.tags.count("svg") == 4) == (kind != "dead")
    assert every[kind]._repr_html_() == card_html(every[kind]) and every[kind]._repr_html_() in html


def test_the_page_says_what_the_card_says(card):
    found = read(page(card))
    text = "".join(found.text)
    for words in ("Latent 7", short(card.effects.kl.value), ends(card.effects.kl), percent(card.frequency.value), "Nearest latents",
                  "licence: unknown", f"prompt {card.examples[0].prompt}, token {card.examples[0].position}", "rank by total effect",
                  card.provenance["weights_sha256"][:12], "logits within", "Atlas:", "delete-one-prompt jackknife",
                  f"its {card.n_active} rows at the 24 joined prompts", "not the selectivity of feature ablation"):  # fmt: skip
        assert words in text, words
    example = card.examples[0]
    assert f"z = {example.z[example.peak]:.3g}, KL = {example.kl[example.peak]:.3g} nats" in found.titles
    body = re.sub(r"\s", "", text)
    assert re.sub(r"\s", "", "".join(example.texts)) in body


def test_texts_names_and_tokens_are_escaped(card):
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
        assert "script" not in found.tags and "<script" not in html
        assert "".join(found.text).count("<script>") >= 2
    assert 'href="a&quot;b.html"' in index_page([evil], {7: 'a"b.html'})


def test_a_dead_latent_says_so_and_an_index_leads_to_every_card(every):
    assert "Dead on this text" in page(every["dead"]) and "Texts" not in page(every["dead"])
    files = {7: "latent_7.html", DEAD: "latent_5.html"}
    found = read(index_page([every["live"], every["dead"]], files))
    assert found.links == list(files.values()) and "dead" in found.text
    assert "Chosen by" not in "".join(found.text)
    by_frequency = index_page([reworded(every["live"], chosen_by="frequent")], files)
    assert "".join(read(by_frequency).text).count("Latents 7. Chosen by frequent:N") == 1


def test_signs_have_their_groups_and_colours(every):
    html = page(every["signed"])
    assert "Strongest, positive z" in html and "Strongest, negative z" in html
    assert re.search(r'<span class="t p( peak)?" style', html) and re.search(r'<span class="t n( peak)?" style', html)
    assert "positive z<" not in page(every["live"])


def test_a_head_wider_than_the_tokenizer():
    """Ids without a token are shown as ids: promoted, suppressed, in the texts and as the likeliest next."""
    narrow, wide = (
        latent_cards(wrap(fresh("llama"), tokenizer(n), name="tiny"), sae(), [7], PROMPTS, **OPTIONS)[0]
        for n in (60, 97)
    )
    for found, known in ((narrow.promoted, wide.promoted), (narrow.suppressed, wide.suppressed)):
        assert [t.token for t in found] == [t.token if (i := int(t.token[1:])) < 60 else f"⟨{i}⟩" for t in known]
    shown = [x for e in narrow.examples for x in (*e.texts, e.top1, e.clean_top1)]
    assert any("⟨" in x for x in shown) and any("w" in x for x in shown)
    html = card_html(narrow)
    read(html)
    assert all(t.token in html for t in (*narrow.promoted, *narrow.suppressed))


def test_colours_are_shares_of_the_largest(card):
    top = max(abs(z) for z in card.z_range)
    shares = [float(s) for s in re.findall(r'style="--z:([\d.]+)(?:;|")', card_html(card))]
    assert max(shares) <= 1 and all(share >= 0 for share in shares)
    peak = card.examples[0]
    assert f"--z:{min(1, abs(peak.z[peak.peak]) / top):.2f}" in card_html(card)


def test_bars_stand_where_their_numbers_say():
    """Heights of a histogram in the ratio of its counts; both ends of the axis inside the picture."""
    svg = z_chart(Histogram(np.array([-2.0, -1, 0, 1, 2]), np.array([1, 0, 4, 2])))
    read(svg)
    heights = [float(h) for h in re.findall(r'class="bar \w+".*?height="([\d.]+)"', svg)]
    assert heights[1] / heights[0] == pytest.approx(4, rel=0.01) and heights[1] / heights[2] == pytest.approx(
        2, rel=0.01
    )
    assert re.findall(r'class="bar (\w+)"', svg) == ["neg", "pos", "pos"]
    even = Histogram(np.geomspace(1, 10, 5), np.full(4, 0.25))
    read(norm_chart((even, even)))


def test_charts_of_little():
    nothing = Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0)
    read(quartile_chart([nothing] * 4))
    alike = Histogram(np.array([0.0, 1.0]), np.array([0]))
    read(z_chart(alike))


def test_effects_and_placebos_are_drawn(card):
    svg = effect_chart(card.effect_rows)
    assert svg.count('class="dot pos"') == svg.count('class="placebo"') == card.n_active
    assert effect_chart(card.effect_rows.iloc[:0]) == ""
    one = effect_chart(card.effect_rows.iloc[:1].assign(kl=0.0))
    assert "nan" not in one + svg and one.count("circle") == 2
    places = [float(y) for y in re.findall(r'cy="([-\d.]+)"', svg)]
    assert min(places) >= 0 and max(places) <= 200


def test_numbers_intervals_and_tokens_in_words():
    assert [short(x) for x in (0.0, -0.12345, 1234.5, 4.96e-4, 1e-4, -2e7, np.nan, np.inf)] == [
        *("0", "−0.123", "1,234", "5·10⁻⁴", "10⁻⁴", "−2·10⁷", "–", "–")
    ]
    assert percent(0.5) == "50\u202f%" and percent(np.nan) == "–"
    assert ends(Estimate(1, 0.5, np.inf, 1, 9, 12)) == "[0.5, ∞]"
    assert ends(Estimate(1, np.nan, np.nan, np.nan, 9, 4)) == "no interval: 4 prompts"
    assert ends(Estimate(1, np.nan, np.nan, np.nan, 9, 1)) == "no interval: 1 prompt"
    assert ends(Estimate(1, np.nan, np.nan, np.nan, 9, 40)) == "no interval"
    assert alone(" a\n<") == "<code>▁a↵&lt;</code>" and alone("") == "<code>◌</code>"
    assert running("a\n") == 'a<span class="w">↵\n</span>' and "◌" in running("")
