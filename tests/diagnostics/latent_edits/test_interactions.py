"""Interactions that must be nothing, interactions written out, and what is drawn and told."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.latent_edits.interactions import COLUMNS, KINDS, LATENTS, Interactions, interactions
from diagnostics.statistics.measures import log_ratio_of_means
from diagnostics.statistics.tables import from_sums
from interventions import ResultError, SiteError
from sae_models.errors import BelongingError
from sae_models.selectors import AbsTopK
from tests.planted import GAIN, SITE, TOKEN, planted_model, standing
from tests.tiny import D_MODEL, VOCAB, alone, exact_kl, prompts, tiny_model

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(28)))


def middle(ratios: pd.Series) -> float:
    """The median, of an even count the geometric mean of the middle two."""
    found = np.sort(ratios.to_numpy(float))
    return float(np.sqrt(found[(len(found) - 1) // 2] * found[len(found) // 2]))


@pytest.fixture(scope="module")
def planted():
    hf, sae = planted_model()
    return interactions(hf, PROMPTS, {"3/standard": sae}, n_tokens=70, per_token=5)


@pytest.fixture(scope="module")
def real():
    """A model whose blocks above the site act; latents of either sign."""
    hf, sae = tiny_model("llama", dtype=torch.float64), planted_model()[1]
    sae.selector = AbsTopK(5)
    return hf, sae, interactions(hf, PROMPTS, {"3/standard": sae}, n_tokens=60, per_token=3)


def test_linear_model_has_no_interactions(planted):
    f = planted.frame
    assert tuple(f.columns) == ("sae", "layer", "point", *(c for c in f.columns[3:])) and set(f.columns) == set(COLUMNS)
    assert (f["rms_interaction"] < 1e-10).all() and (f["rms_i"] > 0).all()
    np.testing.assert_allclose(f["kl_joint"], f["kl_sum"], rtol=1e-8, atol=1e-12)
    assert (planted.provenance["why_hooks"], planted.provenance["rows_dropped"]) == (None, {})


def test_planted_latent_changes_only_its_logit(planted):
    """rms by hand: a change of one logit by c is c·√(p_t(1 − 1/V)² + (1 − p_t)/V²) once the mean over V is taken off."""
    hf, _ = planted_model()
    some = (
        planted.frame[(planted.frame["latent_i"] == 0) & (planted.frame["kind"] == LATENTS)]
        .drop_duplicates("target_prompt")
        .head(5)
    )
    assert len(some) == 5
    for row in some.itertuples():
        p = alone("llama", hf, PROMPTS[row.target_prompt], SITE, row.target_position, lambda x: x).softmax(-1)[TOKEN]
        size = row.z_i * GAIN * (p * (1 - 1 / VOCAB) ** 2 + (1 - p) / VOCAB**2).sqrt()
        np.testing.assert_allclose(row.rms_i, size, rtol=1e-6)  # z is kept in float32
        drop = row.z_i * GAIN  # KL of lowering one logit by c: c·p + log(1 − p + p·e^−c)
        np.testing.assert_allclose(row.kl_i, drop * p + torch.log1p(p * np.expm1(-drop)), rtol=1e-5)


def test_placebos_have_the_geometry_of_their_pair(planted, real):
    for result in (planted, real[2]):
        keys = ["target_prompt", "target_position", "latent_i", "latent_j"]
        parts = {kind: lines.set_index(keys).sort_index() for kind, lines in result.frame.groupby("kind")}
        assert tuple(sorted(parts)) == tuple(sorted(KINDS))
        for kind in KINDS[1:]:
            for name in ("delta_norm_i", "delta_norm_j", "delta_norm"):
                np.testing.assert_allclose(parts[kind][name], parts[LATENTS][name], rtol=1e-6)
            assert not np.allclose(parts[kind]["kl_joint"], parts[LATENTS]["kl_joint"], rtol=1e-2)


def test_pairs_match_three_full_forward_passes(real):
    hf, sae, result = real
    lines = result.frame[result.frame["kind"] == LATENTS]
    assert (lines["z_i"] < 0).any() and (lines["latent_i"] < lines["latent_j"]).all()
    for row in lines.iloc[::37].head(5).itertuples():
        tokens, position = PROMPTS[row.target_prompt], row.target_position
        clean, here = standing("llama", hf, tokens, SITE, position)
        z = sae.encode(here[None])[0]
        delta = [-z[i] * sae.W_dec[i] for i in (row.latent_i, row.latent_j)]
        found = [alone("llama", hf, tokens, SITE, position, lambda x, d=d: x + d) for d in (*delta, sum(delta))]
        change, p = [logits - clean for logits in found], clean.softmax(-1)
        rest = change[2] - change[0] - change[1]
        for name, value in zip(("rms_i", "rms_j", "rms_joint", "rms_interaction"), (*change, rest), strict=True):
            expected = (p * (value - value.mean()) ** 2).sum().sqrt()
            np.testing.assert_allclose(getattr(row, name), expected, rtol=1e-5)
        np.testing.assert_allclose(row.kl_joint, exact_kl(clean, found[2]), rtol=1e-5)
        np.testing.assert_allclose(row.kl_sum, exact_kl(clean, clean + change[0] + change[1]), rtol=1e-5)
        np.testing.assert_allclose(row.delta_norm, sum(delta).norm(), rtol=1e-6)


def test_all_pairs_of_strongest_latents_appear_once(real):
    _, _, result = real
    for _, lines in result.frame.groupby(["kind", "target_prompt", "target_position"]):
        latents = set(lines["latent_i"]) | set(lines["latent_j"])
        assert len(lines) == len(latents) * (len(latents) - 1) // 2 and len(latents) <= 3
        assert not lines.duplicated(["latent_i", "latent_j"]).any()


def test_summary_matrix_and_roundtrip(real, tmp_path):
    _, _, result = real
    group = next(g for g in result.groups if g["kind"] == LATENTS)
    lines = result.frame[result.frame["kind"] == LATENTS]
    ratio = middle(lines["rms_interaction"] / (lines["rms_i"] + lines["rms_j"]))
    assert group["interaction"].value == pytest.approx(ratio) and group["interaction"].value > 0.001
    assert group["joint KL"].value == pytest.approx(np.median(lines["kl_joint"]))
    beyond = (lines["kl_joint"] - lines["kl_sum"]) / lines["kl_joint"]
    assert group["KL beyond sum / joint KL"].value == pytest.approx(np.median(beyond), rel=1e-6)
    matrix = result.matrix(at_least=5)
    assert len(matrix) > 3 and (matrix.index == matrix.columns).all()
    np.testing.assert_array_equal(matrix.to_numpy(), matrix.to_numpy().T)
    i, j = next((i, j) for i in matrix for j in matrix if i < j and np.isfinite(matrix.loc[i, j]))
    own = result.frame[(result.frame["latent_i"] == i) & (result.frame["latent_j"] == j)]
    own = own.assign(bottom=own["rms_i"] + own["rms_j"]).groupby("kind")[["rms_interaction", "bottom"]].sum()
    value = own["rms_interaction"] / own["bottom"]
    assert matrix.loc[i, j] == pytest.approx(value[LATENTS] - value["placebo_token"])
    names = result.write(tmp_path)
    assert "interactions.png" in names and any("matrix" in name for name in names)
    again = Interactions.load(tmp_path)
    assert (
        again.frame.equals(result.frame)
        and len(json.loads((tmp_path / "interactions.json").read_text())["summary"]) == 3
    )


def test_placebo_ratios_use_only_pairs_with_both(real):
    """Placebo rows are removed for some pairs; the latent rows of these pairs must not count either."""
    _, _, result = real
    left_out = (result.frame["kind"] != LATENTS) & (result.frame["latent_i"] == result.frame["latent_i"].min())
    some = Interactions(result.frame[~left_out].reset_index(drop=True), result.tokens, result.provenance)
    both = result.frame[result.frame["latent_i"] != result.frame["latent_i"].min()]
    keys, value = ["target_prompt", "target_position", "latent_i", "latent_j"], {}
    for kind in KINDS:
        lines = both[both["kind"] == kind].set_index(keys).sort_index()
        value[kind] = lines["rms_interaction"] / (lines["rms_i"] + lines["rms_j"])
    found = {g["kind"]: g["latents / kind"] for g in some.groups}
    assert found[LATENTS].value == 1
    for kind in KINDS[1:]:
        assert found[kind].value == pytest.approx(middle(value[LATENTS] / value[kind]), rel=1e-5)
        assert abs(found[kind].value - 1) > 0.01 and found[kind].low < found[kind].value < found[kind].high


def test_prompts_with_equal_beginnings_keep_all_placebos(real):
    """Tokens with equal contexts have equal activations, so their differences give no direction."""
    hf, sae, _ = real
    (first,) = prompts((8,))
    alike = interactions(hf, [[*first, i] for i in range(1, 27)], sae, n_tokens=60, per_token=4)
    assert alike.provenance["rows_dropped"] == {} and alike.frame["kind"].value_counts().nunique() == 1
    test_placebos_have_the_geometry_of_their_pair(alike, (hf, sae, alike))


def test_placebos_without_a_direction_are_dropped_and_counted(real):
    """The differences of three usable tokens span two dimensions; four edits span four."""
    hf, sae, _ = real
    few = interactions(hf, [PROMPTS[0][:4]] * 25, sae, n_tokens=70, per_token=4)
    assert set(few.frame["kind"]) == {LATENTS, "placebo_isotropic"}
    assert few.provenance["rows_dropped"] == {"effect not finite": len(few.frame) // 2}
    assert [g["pairs"] > 0 for g in few.groups] == [True, False, True] and "effect not finite" in few.table()


def test_stale_maps_are_deleted_and_foreign_files_kept(real, tmp_path, monkeypatch):
    _, _, result = real
    monkeypatch.setattr(Interactions, "figures", lambda self: {"interactions_matrix_15-cosine": plt.figure()})
    drawn = {f"interactions_matrix_15-cosine.{end}" for end in ("png", "svg", "pdf")}
    assert drawn <= set(result.write(tmp_path))
    (tmp_path / "interactions_matrix_mine.png").touch()
    monkeypatch.setattr(Interactions, "figures", lambda self: {})
    result.write(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".svg", ".pdf")}
    assert left == {"interactions_matrix_mine.png"}  # which no run drew


def test_from_sums_is_the_jackknife_of_a_ratio():
    generator = np.random.default_rng(0)
    table = pd.DataFrame({"target_prompt": np.arange(200) % 25, "a": generator.random(200), "b": generator.random(200)})
    found = from_sums(table, ["a", "b"], lambda a, b: a / b, "log")
    known = log_ratio_of_means(table["a"].to_numpy(), table["b"].to_numpy(), table["target_prompt"].to_numpy())
    assert (found.value, found.low, found.high) == pytest.approx((known.value, known.low, known.high))


def test_only_chosen_latents_are_paired(real):
    hf, sae, _ = real
    result = interactions(hf, PROMPTS, sae, n_tokens=25, per_token=3, latents=[2, 5, 9])
    assert set(result.frame["latent_i"]) | set(result.frame["latent_j"]) == {2, 5, 9}
    most = interactions(hf, PROMPTS, sae, n_tokens=25, per_token=3, latents=4)
    assert len(set(most.frame["latent_i"]) | set(most.frame["latent_j"])) == 4


def test_run_with_a_folder_gives_the_same_table(real, tmp_path):
    hf, sae, result = real
    again = interactions(hf, PROMPTS, {"3/standard": sae}, n_tokens=60, per_token=3, folder=tmp_path)
    assert again.frame.equals(result.frame)
    with pytest.raises(ResultError, match="n_tokens"):
        interactions(hf, PROMPTS, {"3/standard": sae}, n_tokens=61, per_token=3, folder=tmp_path)


def test_invalid_arguments_raise(real):
    hf, sae, _ = real
    with pytest.raises(ResultError, match="per_token 1"):
        interactions(hf, PROMPTS, sae, per_token=1)
    with pytest.raises(ResultError, match=r"latents \[12\] of inner do not exist; it has 12"):
        interactions(hf, PROMPTS, sae, latents=[0, 12])
    with pytest.raises(SiteError, match="do not say where they act"):
        interactions(hf, PROMPTS, {"one": torch.eye(D_MODEL)}, n_tokens=5)
    wrong = planted_model()[1]
    wrong.hook_name = None
    with pytest.raises(BelongingError):
        interactions(hf, PROMPTS, wrong)
