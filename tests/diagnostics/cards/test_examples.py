"""The choice of example texts, and how their tokens are shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.cards.examples import BANDS, TOP, token_texts, window
from tests.cards import PROMPTS, activations, cards, model, of_tokens, sae, usable
from tests.tiny import tokenizer


def test_examples_are_strongest_then_bands_without_repeats():
    card = cards([7])[0]
    z = np.where(usable(), sae().encode(activations())[:, 7].numpy(), 0)
    prompt, position = of_tokens()
    best = sorted(range(len(PROMPTS)), key=lambda p: -z[prompt == p].max())[:5]
    top = [e for e in card.examples if e.group == TOP]
    assert [e.prompt for e in top] == best
    shown = [e.prompt for e in card.examples]
    assert len(set(shown)) == len(shown) and len(shown) > 6
    active = z[z != 0]
    for e in card.examples:
        ids = PROMPTS[e.prompt]
        assert e.z[e.peak] == pytest.approx(z[(prompt == e.prompt) & (position == e.position)][0], rel=1e-5)
        assert e.texts == token_texts(ids[e.start : e.stop], model().tokenizer) and e.n_prompt == len(ids)
        assert e.following == (model().tokenizer.decode([ids[e.position + 1]]) if e.position + 1 < len(ids) else "")
        if e.group in BANDS:
            low, high = np.quantile(active, BANDS[e.group])
            assert low * 0.98 <= e.z[e.peak] <= high * 1.02


@given(st.integers(1, 60), st.integers(1, 30), st.data())
def test_window_contains_its_token_at_maximal_width(n, width, data):
    position = data.draw(st.integers(0, n - 1))
    start, stop = window(position, n, width)
    assert 0 <= start <= position < stop <= n and stop - start == min(n, width)


class Pieces:
    """A tokenizer of bytes: a character may take several tokens."""

    def decode(self, ids, clean_up_tokenization_spaces=False):
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text("aé€😀 \n", min_size=1, max_size=12))
def test_token_texts_join_to_the_text(text):
    ids = list(text.encode())
    found = token_texts(ids, Pieces())
    assert len(found) == len(ids) and "".join(found) == text


def test_tokens_within_a_character_and_without_a_tokenizer():
    assert token_texts(list("aé\n".encode()), Pieces()) == ("a", "", "é", "\n")
    assert token_texts(list("aé".encode())[:2], Pieces()) == ("a", "\ufffd")  # the text ends there
    assert token_texts([3, 5], None) == ("⟨3⟩", "⟨5⟩")
    assert token_texts([3, 5], model().tokenizer) == ("w3", " w5")
    assert token_texts([3, 70, 5, 96], tokenizer(60)) == ("w3", "⟨70⟩", " w5", "⟨96⟩")
    assert token_texts([70], tokenizer(60)) == ("⟨70⟩",)
