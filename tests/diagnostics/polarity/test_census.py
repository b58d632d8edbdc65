"""The bipolar census: counts written out, planted polarities, and random directions that fire as often."""

import numpy as np
import pytest
import torch

from diagnostics.polarity.census import BipolarCensus, bipolar_census
from interventions import ResultError, record
from sae_models.gates import BiJumpReLU
from sae_models.selectors import AbsTopK
from tests.planted import SITE, planted_model
from tests.tiny import prompts, tiny_model

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(30)))


@pytest.fixture(scope="module")
def found():
    hf, sae = tiny_model("llama", dtype=torch.float64), planted_model()[1]
    sae.selector = AbsTopK(4)
    return hf, sae, bipolar_census(hf, PROMPTS, {"3/signed": sae, "3/plain": planted_model()[1]}, min_active=10)


def latents_of(hf, sae):
    """z of every usable token (all but the first of each prompt: the tiny text has neither sinks nor special tokens), prompt by prompt."""
    recording = record(hf, PROMPTS, [SITE], keep_cache=False)
    x = recording.activations[SITE]
    return [sae.encode(x[i, 1 : len(tokens)]).double().numpy() for i, tokens in enumerate(PROMPTS)]


def test_census_counts_match_the_latents(found):
    hf, sae, result = found
    z = np.concatenate(latents_of(hf, sae))
    assert len(z) == result.provenance["usable"]
    own = result.frame.query("sae == '3/signed' and directions == 'latents'")
    np.testing.assert_array_equal(own["fired"], (z != 0).sum(0))
    np.testing.assert_array_equal(own["positive"], (z > 0).sum(0))
    np.testing.assert_allclose(own["mass"], np.abs(z).sum(0) * sae.W_dec.norm(dim=1).numpy(), rtol=1e-5)
    both = np.minimum((z > 0).sum(0), (z < 0).sum(0)) >= 0.1 * (z != 0).sum(0)
    often = (z != 0).sum(0) >= 10
    group = result.groups[0]
    assert group["bipolar"].value == pytest.approx(both[often].mean()) and group["L0"] == pytest.approx(
        (z != 0).mean(0).sum()
    )
    mass = np.abs(z).sum(0) * sae.W_dec.norm(dim=1).numpy()
    assert group["bipolar_mass"].value == pytest.approx(mass[both & often].sum() / mass[often].sum())


def test_deletions_are_the_census_without_a_prompt(found):
    hf, sae, result = found
    z = latents_of(hf, sae)
    without = result.deletions.query("sae == '3/signed' and directions == 'latents'")
    for row in without.iloc[::9].itertuples():
        left = np.concatenate([part for i, part in enumerate(z) if i != row.prompt])
        often = (left != 0).sum(0) >= 10
        both = np.minimum((left > 0).sum(0), (left < 0).sum(0)) >= 0.1 * (left != 0).sum(0)
        assert row.bipolar == pytest.approx(both[often].mean()) and row.n_tokens == len(z[row.prompt])


def test_random_directions_fire_as_often_as_the_latents(found, tmp_path):
    _, _, result = found
    own, random = (
        result.frame.query(f"sae == '3/signed' and directions == '{name}'") for name in ("latents", "random")
    )
    np.testing.assert_array_equal(own["fired"], random["fired"])
    assert not len(
        result.frame.query("sae == '3/plain' and directions == 'random'")
    )  # no negative latent: nothing to compare
    assert result.groups[-1]["bipolar"].value == 0
    assert "bipolar_census.png" in result.write(tmp_path) and "strongest" in result.table()
    back = BipolarCensus.load(tmp_path)
    assert back.frame.equals(result.frame) and back.deletions.equals(result.deletions)
    assert len(list(back.headlines())) == 1


def test_a_planted_one_sided_dictionary_has_no_bipolar_latent():
    hf, sae = planted_model()
    never = torch.full((sae.d_sae,), 1e9, dtype=torch.float64)
    half = torch.arange(sae.d_sae) % 2 == 0
    zero = torch.zeros(sae.d_sae, dtype=torch.float64)
    sae.selector = BiJumpReLU(torch.where(half, zero, never), torch.where(half, never, zero)).requires_grad_(False)
    result = bipolar_census(hf, PROMPTS, {"one": sae}, min_active=5)
    share = result.frame.query("directions == 'latents' and fired > 0").eval("positive / fired")
    assert set(share) == {0.0, 1.0} and result.groups[0]["bipolar"].value == 0
    assert result.groups[1]["bipolar"].value > 0.5  # directions at random take both signs


def test_zero_min_active_raises(found):
    with pytest.raises(ResultError, match="min_active 0; expected 1 or more"):
        bipolar_census(found[0], PROMPTS, found[1], min_active=0)
