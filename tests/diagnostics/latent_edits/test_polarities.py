"""What the two polarities of a latent do: cosines written out, planted truths, which tokens are taken."""

import numpy as np
import pytest
import torch

from diagnostics.latent_edits.polarities import COLUMNS, PolarityEffects, polarity_effects
from interventions import ResultError
from sae_models.selectors import AbsTopK
from tests.planted import SITE, planted_model, standing
from tests.tiny import alone, prompts, tiny_model

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(26)))
PAIR = ("target", "source")


def signed(sae):
    sae.selector = AbsTopK(4)
    return sae


@pytest.fixture(scope="module")
def found():
    hf, sae = tiny_model("llama", dtype=torch.float64), signed(planted_model()[1])
    return hf, sae, polarity_effects(hf, PROMPTS, {"3/signed": sae}, latents=5, tokens_per_latent=3)


def change_of(hf, row, end, delta):
    tokens, position = PROMPTS[getattr(row, f"{end}_prompt")], getattr(row, f"{end}_position")
    clean, new = (
        alone("llama", hf, tokens, SITE, position, lambda x, add=add: x + add)
        for add in (torch.zeros_like(delta), delta)
    )
    change = new - clean
    return (
        change - change.mean(),
        clean.softmax(-1),
        (clean.softmax(-1) * (clean.log_softmax(-1) - new.log_softmax(-1))).sum(),
    )


def test_rows_match_full_forward_passes(found):
    hf, sae, result = found
    assert set(result.frame.columns) == set(COLUMNS)
    lines = result.frame[result.frame["kind"] == "latents"]
    assert set(map(tuple, lines[["edit", "relation"]].to_numpy())) == {
        ("ablation", "alike"), ("ablation", "opposite"), ("steering", "opposite"),
    }  # fmt: skip
    for row in lines.iloc[::17].itertuples():
        sign = -1 if row.edit == "ablation" else 1
        deltas = {end: sign * getattr(row, f"z_{end}") * sae.W_dec[row.latent] for end in PAIR}
        (a, p, kl), (b, q, other) = (change_of(hf, row, end, deltas[end]) for end in PAIR)
        w = (p + q) / 2
        cosine = (w * a * b).sum() / ((w * a * a).sum() * (w * b * b).sum()).sqrt()
        np.testing.assert_allclose(row.cosine, cosine, atol=2e-5)
        np.testing.assert_allclose([row.kl_target, row.kl_source], [kl, other], rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose([row.delta_norm_target, row.delta_norm_source], [deltas[end].norm() for end in PAIR], rtol=1e-5)  # fmt: skip


def test_tokens_have_the_right_sign_and_pairs_are_complete(found):
    _, sae, result = found
    frame, n = result.frame, 3
    removed, added = (
        frame[(frame["edit"] == edit) & (frame["kind"] == "latents")] for edit in ("ablation", "steering")
    )
    alike = removed["z_target"] * removed["z_source"] > 0
    assert (alike == (removed["relation"] == "alike")).all()
    assert (removed.loc[~alike, "z_target"] > 0).all()
    count = removed.groupby(["latent", "relation"]).size().unstack()
    assert (count["alike"] == n * (n - 1)).all() and (count["opposite"] == n * n).all()
    assert (added["z_source"] == -added["z_target"]).all() and (added.groupby("latent").size() == n).all()
    for row in added.itertuples():
        _, x = standing("llama", found[0], PROMPTS[row.target_prompt], SITE, row.target_position)
        assert sae.encode(x)[row.latent] == 0
    dose = frame.pivot_table(index=["latent", "edit", "target_prompt", "target_position", "source_prompt", "source_position"],
                             columns="kind", values="delta_norm_target")  # fmt: skip
    for kind in ("placebo_token", "placebo_isotropic"):
        np.testing.assert_allclose(dose[kind], dose["latents"], rtol=1e-5)


def test_polarities_are_opposite_in_a_linear_model(tmp_path):
    """Logits are linear in the residual stream, so all cosines are 1 or −1, for latents and placebos alike."""
    hf, sae = planted_model()
    result = polarity_effects(hf, PROMPTS, {"3/signed": signed(sae)}, latents=4, tokens_per_latent=3)
    for g in result.groups:
        assert g["cosine"].value == pytest.approx(1 if g["relation"] == "alike" else -1, abs=1e-6)
        assert g["kind"] == "latents" or g["latents − this"].value == pytest.approx(0, abs=1e-6)
    assert "polarity_effects.png" in result.write(tmp_path) and "opposite" in result.table()
    assert PolarityEffects.load(tmp_path).frame.equals(result.frame)
    assert len(list(result.headlines())) == 2


def test_invalid_arguments_raise(found):
    hf, sae, _ = found
    with pytest.raises(ResultError, match="no latent of one has both polarities"):
        polarity_effects(hf, PROMPTS, {"one": planted_model()[1]})
    with pytest.raises(ResultError, match="tokens_per_latent 1; expected 2 or more"):
        polarity_effects(hf, PROMPTS, sae, tokens_per_latent=1)
    with pytest.raises(ResultError, match=r"latents \[3\] of one are not bipolar with 99 tokens of each polarity"):
        polarity_effects(hf, PROMPTS, {"one": sae}, latents=[3], tokens_per_latent=99)
