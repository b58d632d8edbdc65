"""The sparsity of effects where it is known, and along the tokens that follow against full forward passes."""

import numpy as np
import pytest
import torch

from diagnostics.latent_edits.sparsity import COLUMNS, AblationSparsity, ablation_sparsity, sparsity
from interventions import ResultError
from tests.planted import GAIN, SITE, planted_model
from tests.tiny import VOCAB, exact_kl, forward_alone, prompts, tiny_model

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(30)))
T = 3


@pytest.fixture(scope="module")
def planted():
    hf, sae = planted_model()
    return ablation_sparsity(hf, PROMPTS, {"3/standard": sae}, latents=[0, 1, 2], tokens_per_latent=25, horizon=T)


@pytest.fixture(scope="module")
def real():
    hf, sae = tiny_model("llama", dtype=torch.float64), planted_model()[1]
    return hf, sae, ablation_sparsity(hf, PROMPTS, {"3/standard": sae}, latents=4, tokens_per_latent=15, horizon=T)


def test_sparsity_of_known_logit_changes():
    one = torch.zeros(1, 4, 25, dtype=torch.float64)
    one[0, 2, 7] = -3.0
    drawn = torch.randn(1, 4, 25000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = torch.ones(1, 4, 25, dtype=torch.float64)  # 12 up, 12 down, and the one that is the median
    halves[..., :12], halves[..., 24] = -1, 0
    assert sparsity(one)["sparsity"].item() == pytest.approx(1 / 100)
    assert sparsity(drawn)["sparsity"].item() == pytest.approx(2 / np.pi, rel=0.01)
    assert sparsity(halves)["sparsity"].item() == pytest.approx(24 / 25)
    assert sparsity(one + 5)["l2"].item() == pytest.approx(3) and sparsity(7 * one)["sparsity"].item() == pytest.approx(
        0.01
    )
    assert sparsity(0 * one)["sparsity"].isnan().all()


def test_planted_latent_changes_one_logit_at_one_position(planted):
    own = planted.frame[(planted.frame["edit"] == "latent") & (planted.frame["latent"] == 0)]
    np.testing.assert_allclose(own["sparsity"], 1 / (VOCAB * T), rtol=1e-6)
    np.testing.assert_allclose(own["l2"], own["z"] * GAIN, rtol=1e-6)
    assert (own[["kl_at_1", "kl_at_2"]].abs() < 1e-12).all(axis=None)
    others = planted.frame[(planted.frame["edit"] == "latent") & (planted.frame["latent"] != 0)]
    assert (others["sparsity"] > 5 / (VOCAB * T)).all()


def test_rows_match_full_forward_passes(real):
    hf, sae, result = real
    assert set(COLUMNS) <= set(result.frame.columns)
    for row in result.frame[result.frame["edit"] == "latent"].iloc[::13].itertuples():
        tokens, at = PROMPTS[row.target_prompt], row.target_position
        clean = forward_alone("llama", hf, tokens, None, {})
        new = forward_alone("llama", hf, tokens, SITE, {at: lambda x, row=row: x - row.z * sae.W_dec[row.latent]})
        change = (new - clean)[at : at + T]
        change = change - change.sort(dim=1).values[:, VOCAB // 2, None]
        np.testing.assert_allclose(row.sparsity, change.abs().sum() ** 2 / (change**2).sum() / (VOCAB * T), rtol=1e-4)
        kl = [float(exact_kl(clean[at + j], new[at + j])) for j in range(T)]
        np.testing.assert_allclose([row.kl_at_0, row.kl_at_1, row.kl_at_2], kl, rtol=1e-4, atol=1e-12)


def test_channel_placebo_and_self_rows_have_the_right_dose(real):
    _, _, result = real
    keys = ["latent", "target_prompt", "target_position"]
    by = {edit: lines.set_index(keys).sort_index() for edit, lines in result.frame.groupby("edit")}
    for kind in ("placebo_token", "placebo_isotropic"):
        np.testing.assert_allclose(by[kind]["delta_norm"], by["latent"]["delta_norm"], rtol=1e-5)
    assert (by["self"]["delta_norm"] == 0).all() and (by["self"]["l2"] < 1e-10).all()
    assert (by["channel"]["channel"] >= 0).all() and (by["latent"]["channel"] == -1).all()
    assert (result.frame["target_position"] + T <= [len(PROMPTS[p]) for p in result.frame["target_prompt"]]).all()


def test_rows_within_rounding_are_left_out_and_counted(real):
    _, _, result = real
    frame = result.frame.copy()
    frame.loc[frame["edit"] == "self", "l2"] = frame.loc[frame["edit"] == "latent", "l2"].median() / 10
    some = AblationSparsity(frame, result.tokens, result.provenance)
    n = (frame["edit"] == "latent").sum()
    lines, lost = some.clear("3/standard", "latent")
    assert len(lines) + lost == n and lost == -(-n // 2)


def test_by_latent_horizon_and_roundtrip(real, tmp_path):
    _, _, result = real
    each = result.by_latent()
    assert len(each) == 4 and (each["tokens"] <= 15).all()
    along = result.horizon("3/standard", "latent")
    own = result.frame[result.frame["edit"] == "latent"]
    np.testing.assert_allclose(along["value"], own[["kl_at_0", "kl_at_1", "kl_at_2"]].astype(float).median(), rtol=1e-6)
    group = next(g for g in result.groups if g["edit"] == "latent")
    whole = own[["kl_at_0", "kl_at_1", "kl_at_2"]].astype(float).sum(axis=1)
    assert group["KL"].value == pytest.approx(np.median(whole))
    shares = np.sort(1 - own["kl_at_0"].astype(float) / whole)
    assert shares[(len(shares) - 1) // 2] <= group["beyond the token"].value <= shares[len(shares) // 2]
    assert "ablation_sparsity.png" in result.write(tmp_path) and "beyond the token" in result.table()
    assert AblationSparsity.load(tmp_path).frame.equals(result.frame)


def test_zero_horizon_raises(real):
    with pytest.raises(ResultError, match="horizon 0"):
        ablation_sparsity(real[0], PROMPTS, real[1], horizon=0)
