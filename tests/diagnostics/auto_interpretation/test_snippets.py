"""Examples and snippets of a made-up text: strongest first, quarters of z, inactive ones about latents of like density."""

import numpy as np
from scipy import sparse

from diagnostics.auto_interpretation.snippets import Snippets
from diagnostics.running.text_latents import Asked, TextLatents

N, LENGTH = 60, 30


def made(z: np.ndarray) -> Snippets:
    """Of latent 0; every token usable, odd prompts held out."""
    prompt, position = np.divmod(np.arange(N * LENGTH), LENGTH)
    text = TextLatents(
        prompt, position, sparse.csc_matrix(z), np.zeros((len(z), 0)), np.ones((N, LENGTH), dtype=bool), {}
    )
    return Snippets(text, prompt % 2 == 1, Asked(0, 1, 0, 1.0, 0.01), np.full(N, LENGTH), 5, 0, "made")


def latents() -> np.ndarray:
    """Latent 0 fires at position 9 of every prompt, 1 (as often) at 20, 2 (ten times as often) at 3 to 12 and 14, 3 never."""
    z = np.zeros((N, LENGTH, 4))
    z[:, 9, 0] = 1 + np.arange(N)
    z[:, 20, 1] = 1
    z[:, [*range(3, 12), 14], 2] = 1
    return z.reshape(-1, 4)


def test_inactive_snippets_use_latents_of_similar_density():
    own, matched = made(latents()).held_out(8)
    assert matched and sum(s.active for s in own) == 8 and len({(s.prompt, s.active) for s in own}) == 16
    assert {s.position for s in own if s.active} == {9} and {s.position for s in own if not s.active} == {20}
    assert all(s.prompt % 2 for s in own)
    quarter = np.bincount([(s.prompt // 2) * 4 // (N // 2) for s in own if s.active])
    assert quarter.tolist() == [2, 2, 2, 2]  # z grows with the prompt
    assert [s.active for s in own] != sorted(s.active for s in own)  # in no order


def test_unmatched_inactive_snippets_avoid_active_tokens():
    own, matched = made(latents()[:, [0, 2]]).held_out(8)
    assert not matched
    away = [s.position for s in own if not s.active]
    assert len(away) == 8 and all(abs(p - 9) > 2 for p in away) and len(set(away)) > 3


def test_examples_are_the_strongest_then_drawn_by_strength():
    snippets = made(latents())
    tokens = snippets.examples(4, 6)
    prompts = snippets.text.prompt[tokens]
    assert prompts[:4].tolist() == [58, 56, 54, 52] and len(set(prompts)) == 10 and not (prompts % 2).any()
    assert (np.diff(snippets.z[tokens]) < 0).all() and prompts[4:].mean() > 26  # 0 to 50 on average without weights
    assert len(snippets.examples(50, 6)) == 30
