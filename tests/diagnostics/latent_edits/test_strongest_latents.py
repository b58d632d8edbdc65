"""Which latents of a token come first, what removes them, and the same edits turned."""

import numpy as np
import pandas as pd
import torch

from diagnostics.latent_edits.bench import LatentEdits, removals, strongest, turned
from diagnostics.latent_edits.firings import Firings
from diagnostics.running.clean import CleanActivations, RunSettings
from interventions.models.wrapping import wrap
from interventions.texts.prompts import as_prompts
from sae_models.dictionaries import dictionaries_of
from sae_models.selectors import AbsTopK
from tests.planted import SITE, planted_model
from tests.tiny import prompts, tiny_model

ITEMS = pd.DataFrame({"target_prompt": [0, 1, 1], "target_position": [3, 2, 7]})


def bench() -> LatentEdits:
    model, sae = wrap(tiny_model("llama", dtype=torch.float64)), planted_model()[1]
    sae.selector = AbsTopK(5)  # latents of either sign
    (dictionary,) = dictionaries_of({"one": sae}, model, None)
    clean = CleanActivations(model, as_prompts(prompts((9, 9)), None), RunSettings(sites=(SITE,)))
    return LatentEdits(clean, dictionary, Firings(*clean.tokens, active=None), 0, {})


def test_latents_are_sorted_by_size_and_sum_to_reconstruction():
    one = bench()
    x = one.x(ITEMS)
    index, z = strongest(one, x)
    assert index.shape == (3, 5) and (z < 0).any()
    deltas = removals(one, index, z)
    assert (deltas.norm(dim=-1).diff(dim=1) <= 0).all()
    whole = one.sae.encode(x) @ one.sae.W_dec
    torch.testing.assert_close(-deltas.sum(1), whole)
    few, _ = strongest(one, x, 2)
    assert torch.equal(few, index[:, :2])


def test_missing_latents_are_padded_with_zero_edits():
    one = bench()
    x = one.x(ITEMS)
    among = np.array([int(strongest(one, x)[0][0, 4])])
    index, z = strongest(one, x, 3, among)
    assert index[0].tolist() == [*among, -1, -1] and (removals(one, index, z)[0, 1:] == 0).all()


def test_turned_edits_keep_their_geometry_at_each_token():
    one = bench()
    x = one.x(ITEMS)
    deltas = removals(one, *strongest(one, x))
    for kind in ("placebo_token", "placebo_isotropic"):
        found = turned(one, kind, ITEMS, x, deltas)
        torch.testing.assert_close(found @ found.mT, deltas @ deltas.mT, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found @ x[..., None], deltas @ x[..., None], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found, deltas, rtol=0.1)
