"""Where latents fire, against the dense table, and who is drawn."""

import numpy as np
import pytest

from diagnostics.latent_edits.firings import Firings, chosen_latents, partner_of
from interventions import ResultError, Site
from sae_models.active_latents import active_latents
from sae_models.dictionaries import Dictionary
from sae_models.selectors import AbsTopK
from tests.sae_models.built import inputs, random_sae


@pytest.fixture(scope="module")
def found():
    sae, x = random_sae("standard").float(), inputs(60).float()
    sae.selector = AbsTopK(4)
    number = np.arange(60)
    return Firings(number // 6, number % 6, active_latents(sae, x)), sae.encode(x).detach().numpy()


def test_counts_and_typical_activations_match_a_dense_table(found):
    firings, z = found
    np.testing.assert_array_equal(firings.count, (z != 0).sum(0))
    size = np.abs(z).sum(0) / np.maximum(1, (z != 0).sum(0))
    np.testing.assert_allclose(firings.typical, np.where(z.sum(0) < 0, -size, size), rtol=1e-5)
    assert (firings.typical < 0).any() and (firings.typical[firings.count == 0] == 0).all()


def test_among_restricts_to_the_given_tokens(found):
    firings, z = found
    keep = np.arange(60) % 3 != 1
    some = firings.among(keep)
    np.testing.assert_allclose(some.active.matrix().toarray(), z[keep], rtol=1e-5)
    np.testing.assert_array_equal(some.prompt, firings.prompt[keep])


def test_drawn_tokens_are_firings_and_draws_are_nested(found):
    firings, z = found
    latents = firings.draw(5, 0, "x")
    table = {n: firings.some(latents, n, 0, "x") for n in (2, 4)}
    for n, lines in table.items():
        np.testing.assert_array_equal(lines.groupby("latent").size(), np.minimum(firings.count[latents], n))
        np.testing.assert_allclose(
            lines["z"], z[lines["target_prompt"] * 6 + lines["target_position"], lines["latent"]], rtol=1e-5
        )
    small, large = (
        {tuple(x) for x in table[n][["latent", "target_prompt", "target_position"]].to_numpy()} for n in (2, 4)
    )
    assert small < large
    assert set(firings.draw(3, 0, "x")) < set(latents) and set(firings.draw(5, 1, "x")) != set(latents)
    assert (firings.count[firings.draw(99, 0, "x", at_least=5)] >= 5).all()


def test_partner_is_the_most_often_coactive_latent(found):
    firings, z = found
    latent = int(firings.count.argmax())
    together = ((z != 0) & (z[:, [latent]] != 0)).sum(0)
    together[latent] = 0
    assert partner_of(firings, latent) == together.argmax()
    assert partner_of(firings, int(np.flatnonzero(firings.count == 0)[0])) == -1


def test_missing_or_silent_latents_raise(found):
    firings, _ = found
    dictionary = Dictionary("one", Site(0), inputs(40))
    assert chosen_latents(firings, [int(firings.count.argmax())], 0, dictionary, 1).tolist() == [firings.count.argmax()]
    for wrong in (40, -1, int(np.flatnonzero(firings.count == 0)[0])):
        with pytest.raises(ResultError, match="do not exist or never fire"):
            chosen_latents(firings, [wrong], 0, dictionary, 1)
    with pytest.raises(ResultError, match="61 usable tokens"):
        chosen_latents(firings, 3, 0, dictionary, 61)
