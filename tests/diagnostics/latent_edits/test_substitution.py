"""Substitution and the deletion of equal dose, written out; which atoms take the place."""

import numpy as np
import pytest
import torch

from diagnostics.latent_edits.substitution import ATOMS, COLUMNS, EDITS, Substitutions, atom_substitution
from interventions import ResultError
from sae_models.selectors import AbsTopK
from tests.planted import SITE, planted_model
from tests.tiny import alone, exact_kl, prompts, tiny_model

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(26)))


@pytest.fixture(scope="module")
def found():
    hf, sae = tiny_model("llama", dtype=torch.float64), planted_model()[1]
    sae.selector = AbsTopK(4)
    return hf, sae, atom_substitution(hf, PROMPTS, {"3/standard": sae}, latents=6, tokens_per_latent=25)


def test_edits_match_full_forward_passes(found):
    hf, sae, result = found
    assert set(result.frame.columns) == set(COLUMNS) and (result.frame["z"] < 0).any()
    lines = result.frame[result.frame["edit"].isin(EDITS[:3])]
    for row in lines.iloc[::101].itertuples():
        tokens, d = PROMPTS[row.target_prompt], sae.W_dec
        clean = alone("llama", hf, tokens, SITE, row.target_position, lambda x: x)
        unit = d / d.norm(dim=1, keepdim=True)
        other = unit[row.other] * torch.sign(unit[row.other] @ unit[row.latent])
        change = row.z * (d[row.latent].norm() * other - d[row.latent])
        if row.edit != "substitution":
            size = (2 - 2 * unit[row.latent] @ other).sqrt() if row.edit == "matched_deletion" else 1.0
            change = -size * row.z * d[row.latent]
        new = alone("llama", hf, tokens, SITE, row.target_position, lambda x, change=change: x + change)
        np.testing.assert_allclose(row.kl, exact_kl(clean, new), rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(row.delta_norm, change.norm(), rtol=1e-5)
        np.testing.assert_allclose(row.decoder_cosine, unit[row.latent] @ other, rtol=1e-5)


def test_matched_deletion_and_placebos_have_equal_dose(found):
    keys = ["latent", "target_prompt", "target_position", "atom"]
    dose = found[2].frame.pivot(index=keys, columns="edit", values="delta_norm")
    for edit in ("matched_deletion", "placebo_token", "placebo_isotropic"):
        np.testing.assert_allclose(dose[edit], dose["substitution"], rtol=1e-5)
    assert (dose["deletion"] < dose["substitution"] * 1.5).all()


def test_nearest_atom_is_the_closest_other_latent(found):
    _, sae, result = found
    f = result.frame
    assert (f["other"] != f["latent"]).all() and set(f["atom"]) == set(ATOMS)
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    close = (unit @ unit.T).abs().fill_diagonal_(0)
    near = f[f["atom"] == "nearest"]
    np.testing.assert_array_equal(near["other"], close.argmax(1).numpy()[near["latent"]])
    assert (f["decoder_cosine"] >= 0).all()


def test_wins_are_counted(found, tmp_path):
    result = found[2]
    contests = result.contests("3/standard", "random")
    group = next(g for g in result.groups if g["atom"] == "random")
    assert group["wins"].value == pytest.approx((contests["substitution"] < contests["matched_deletion"]).mean())
    ratios = np.sort((contests["substitution"] / contests["deletion"]).to_numpy(float))
    middle = ratios[[(len(ratios) - 1) // 2, len(ratios) // 2]]
    assert group["KL / deletion"].value == pytest.approx(np.sqrt(middle.prod()))
    assert "atom_substitution.png" in result.write(tmp_path) and "wins" in result.table()
    assert Substitutions.load(tmp_path).frame.equals(result.frame)


def test_zero_tokens_raise(found):
    with pytest.raises(ResultError, match="tokens_per_latent 0"):
        atom_substitution(found[0], PROMPTS, found[1], tokens_per_latent=0)


def test_contests_survive_a_missing_token_placebo(found):
    hf, sae, _ = found
    few = atom_substitution(hf, [PROMPTS[0][:2]] * 25, sae, latents=4)  # one usable token: no difference of two
    assert few.provenance["rows_dropped"]["effect not finite"] == len(few.contests("inner", "random")) * len(ATOMS)
    group = few.groups[-1]
    assert np.isnan(group["KL / placebo_token"].value) and group["KL / placebo_isotropic"].value > 0
