"""Steering where what it does is known, against full forward passes, and where the target comes from."""

import numpy as np
import pytest
import torch

from diagnostics.latent_edits.steering import COLUMNS, CONDITIONS, Steering, latent_steering
from interventions import ResultError
from tests.planted import D_SAE, GAIN, SITE, TOKEN, planted_model, standing
from tests.tiny import VOCAB, alone, exact_kl, prompts, tiny_model

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(26)))
COEFFICIENTS = (0.5, 1.0, 3.0)


@pytest.fixture(scope="module")
def planted():
    hf, sae = planted_model()
    return latent_steering(
        hf, PROMPTS, {"3/standard": sae}, latents=[0, 4], n_tokens=60, coefficients=COEFFICIENTS, min_active=1
    )


def test_steering_raises_the_planted_token_linearly(planted):
    f = planted.frame
    assert set(f.columns) == set(COLUMNS) and set(f["condition"]) == set(CONDITIONS)
    own = f[(f["latent"] == 0) & (f["condition"] == "single")]
    assert (own["target_token"] == TOKEN).all()
    typical = own["delta_norm"] / own["coefficient"]  # ‖d‖ = 1
    np.testing.assert_allclose(typical, typical.iloc[0], rtol=1e-9)
    np.testing.assert_allclose(own["logit_change"], own["delta_norm"] * GAIN * (1 - 1 / VOCAB), rtol=1e-6)
    assert (own["rank"] <= own["clean_rank"]).all() and (own["probability"] >= own["clean_probability"]).all()


def test_joint_steering_adds_up_and_placebos_match_its_dose(planted):
    keys = ["latent", "target_prompt", "target_position", "coefficient"]
    by = {name: lines.set_index(keys).sort_index() for name, lines in planted.frame.groupby("condition")}
    np.testing.assert_allclose(
        by["joint"]["logit_change"], by["single"]["logit_change"] + by["partner"]["logit_change"], rtol=1e-6, atol=1e-6
    )
    for edit in ("single", "joint"):
        for kind in ("placebo_token", "placebo_isotropic"):
            np.testing.assert_allclose(by[f"{edit}_{kind}"]["delta_norm"], by[edit]["delta_norm"], rtol=1e-5)


def test_rows_match_full_forward_passes():
    hf, (_, sae) = tiny_model("llama", dtype=torch.float64), planted_model()
    result = latent_steering(
        hf,
        PROMPTS,
        sae,
        latents=[1],
        partners={1: 5},
        targets={1: 33},
        n_tokens=22,
        coefficients=(-1.0, 0.3),
        unit="norm",
        min_active=1,
    )
    for row in result.frame[result.frame["condition"] == "joint"].iloc[::9].itertuples():
        tokens = PROMPTS[row.target_prompt]
        clean, here = standing("llama", hf, tokens, SITE, row.target_position)
        d = sae.W_dec[[1, 5]] / sae.W_dec[[1, 5]].norm(dim=1, keepdim=True)
        step = row.coefficient * here.norm() * d.sum(0)
        found = alone("llama", hf, tokens, SITE, row.target_position, lambda x, step=step: x + step)
        np.testing.assert_allclose(row.kl, exact_kl(clean, found), rtol=1e-5)
        np.testing.assert_allclose(row.logit, found[33] - found.mean(), rtol=1e-5)
        np.testing.assert_allclose(row.probability, found.softmax(-1)[33], rtol=1e-5)
        np.testing.assert_allclose(row.entropy, torch.distributions.Categorical(logits=found).entropy(), rtol=1e-5)
        assert row.rank == int((found > found[33]).sum()) and row.clean_rank == int((clean > clean[33]).sum())
        np.testing.assert_allclose(row.norm, here.norm(), rtol=1e-6)
    assert (result.frame["partner"] == 5).all()


def test_roundtrip(planted, tmp_path):
    assert "latent_steering.png" in planted.write(tmp_path)
    assert Steering.load(tmp_path).frame.equals(planted.frame)
    assert "peak" in planted.table()


def test_invalid_arguments_raise():
    hf, sae = planted_model()
    for wrong, said in (
        ({"unit": "z"}, "unit 'z'"),
        ({"coefficients": (1.0, 1.0)}, "each once"),
        ({"latents": [D_SAE]}, "do not exist"),
    ):
        with pytest.raises(ResultError, match=said):
            latent_steering(hf, PROMPTS, sae, n_tokens=5, **wrong)
