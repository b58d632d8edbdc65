"""Latents read from passes that end early against whole recordings encoded at once; which latents are asked."""

import numpy as np
import pytest
import torch

from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.running.text_latents import ask_latents, held_out_prompts, read_latents, run_sequences
from interventions import ResultError, Site
from interventions.models.wrapping import wrap
from interventions.texts.prompts import prompts_for
from sae_models.dictionaries import dictionaries_of
from sae_models.selectors import AbsTopK
from tests.planted import SITE, planted_model
from tests.tiny import D_MODEL, prompts

TEXT = prompts(tuple(4 + (5 * i) % 9 for i in range(30)))
ROWS = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def read(signed: bool = False):
    """The planted SAE at its own site and one block earlier, read in one pass; and the model."""
    hf, sae = planted_model()
    if signed:
        sae.selector = AbsTopK(5)
    model = wrap(hf)
    here = dictionaries_of({"here": sae}, model, None)
    other = planted_model()[1]
    other.hook_name = Site(1).hook_name
    there = dictionaries_of({"there": other}, model, None)
    text = prompts_for(model, TEXT)
    return model, text, [*there, *here], read_latents(model, text, [*there, *here], 1.2, {"here": ROWS})


def test_latents_match_full_recordings():
    model, text, dictionaries, found = read()
    for d in dictionaries:
        clean = CleanActivations(model, text, RunSettings(sites=(d.site,), sink_filter=1.2))
        own, (prompt, position) = found[d.name], clean.tokens
        assert np.array_equal(own.prompt, prompt) and np.array_equal(own.position, position)
        assert own.left_out == clean.filter.left_out() and "sink" in own.left_out
        x = clean.at(d.site, prompt, position)
        z = d.sae.encode(x).numpy()
        assert np.allclose(own.z.toarray(), z, rtol=1e-5, atol=1e-6) and np.allclose(own.of(2), z[:, 2], atol=1e-5)
        by_hand = (x @ ROWS.T).numpy() if d.site == SITE else np.zeros((len(x), 0))
        assert np.allclose(own.readings, by_hand, rtol=1e-5, atol=1e-5)


def test_sequences_share_passes():
    model = read()[0]
    seen = np.zeros(len(TEXT), dtype=int)

    def see(site, which, hidden):
        seen[which] += 1
        assert hidden.shape[1] == max(len(TEXT[i]) for i in which)

    assert run_sequences(model, TEXT, [SITE], see) == 1 and (seen == 1).all()
    assert run_sequences(model, [], [SITE], see) == 0


def test_drawn_polarities_are_weighted_to_all_eligible():
    _, _, dictionaries, found = read(signed=True)
    own, d = found["here"], dictionaries[1]
    fit = ~held_out_prompts(len(TEXT), 0.4, 0)[own.prompt]
    z = own.z.toarray()
    asked, said = ask_latents(own, fit, d, 9, 4, seed=0)
    eligible = {
        (i, p) for p in (1, -1) for i in range(len(d)) if (p * z[fit, i] > 0).sum() >= 4 and (p * z[~fit, i] > 0).any()
    }
    assert len(asked) == 9 and {(a.latent, a.polarity) for a in asked} < eligible
    assert sum(a.weight for a in asked) == pytest.approx(len(eligible) == said["eligible"] and len(eligible))
    for a in asked:
        assert a.frequency == pytest.approx((a.polarity * z[fit, a.latent] > 0).mean())
    named, _ = ask_latents(own, fit, d, [asked[0].latent], 4, seed=0)
    assert {a.latent for a in named} == {asked[0].latent} and {a.weight for a in named} == {1.0}


def test_prompts_are_held_out_by_share():
    out = held_out_prompts(100, 0.3, 0)
    assert out.sum() == 30 and not np.array_equal(out, held_out_prompts(100, 0.3, 1))
    assert held_out_prompts(2, 0.01, 0).sum() == 1
    with pytest.raises(ResultError, match=r"test_share 0\.5 of 1 prompts"):
        held_out_prompts(1, 0.5, 0)
