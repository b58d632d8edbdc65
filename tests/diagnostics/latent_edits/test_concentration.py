"""Latents removed and kept one after another, against full forward passes and where everything adds up."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.latent_edits.concentration import COLUMNS, EDITS, Concentration, causal_concentration
from diagnostics.latent_edits.concentration_summary import GRID, counts, curve, shares
from interventions import ResultError
from tests.planted import SITE, planted_model, standing
from tests.tiny import alone, exact_kl, prompts, tiny_model

PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(26)))


@pytest.fixture(scope="module")
def planted():
    hf, sae = planted_model()
    return causal_concentration(hf, PROMPTS, {"3/standard": sae}, n_tokens=40)


@pytest.fixture(scope="module")
def real():
    hf, sae = tiny_model("llama", dtype=torch.float64), planted_model()[1]
    return hf, sae, causal_concentration(hf, PROMPTS, {"3/standard": sae}, n_tokens=3)


def test_single_effects_add_up_in_a_linear_model(planted):
    f = planted.frame
    assert set(f.columns) == set(COLUMNS) and set(f["edit"]) == set(EDITS)
    last = f[f["kl_sum"].notna()]
    assert len(last) == 3 * f.groupby(["target_prompt", "target_position"]).ngroups
    np.testing.assert_allclose(last["kl_sum"], last["kl_all"], rtol=1e-6)
    np.testing.assert_allclose(last[["sum_cosine", "sum_ratio"]], 1, rtol=1e-9)


def test_full_removal_ignores_order_and_full_keep_is_zero(planted):
    f = planted.frame[planted.frame["n"] == planted.frame["n_active"]]
    removed = f[f["edit"] == "remove"]
    np.testing.assert_allclose(removed["kl"], removed["kl_all"], rtol=1e-8, atol=1e-12)
    assert (f.loc[f["edit"] == "keep", ["kl", "delta_norm"]] < 1e-12).all(axis=None)
    placebo = f[f["edit"].str.startswith("placebo")]
    own = removed[removed["order"] == "size"].set_index(["target_prompt", "target_position"])["delta_norm"]
    for _, lines in placebo.groupby("edit"):
        np.testing.assert_allclose(lines.set_index(["target_prompt", "target_position"])["delta_norm"], own, rtol=1e-6)


def test_rows_match_full_forward_passes(real):
    hf, sae, result = real
    for (prompt, position), lines in result.frame.groupby(["target_prompt", "target_position"]):
        clean, here = standing("llama", hf, PROMPTS[prompt], SITE, position)
        z = sae.encode(here[None])[0]
        parts = z[:, None] * sae.W_dec

        def logits(latents, parts=parts, prompt=prompt, position=position):
            return alone("llama", hf, PROMPTS[prompt], SITE, position, lambda x: x - parts[latents].sum(0))

        active = z.nonzero()[:, 0].tolist()
        single = {i: float(exact_kl(clean, logits([i]))) for i in active}
        orders = {
            "size": sorted(active, key=lambda i: -float(parts[i].norm())),
            "effect": sorted(active, key=lambda i: -single[i]),
        }
        for (edit, order), some in lines.groupby(["edit", "order"]):
            if edit in ("remove", "keep") and order in orders:
                for n in (1, 3):
                    first, rest = orders[order][:n], orders[order][n:]
                    kl = some.loc[some["n"] == n, "kl"].item()
                    np.testing.assert_allclose(
                        kl, exact_kl(clean, logits(first if edit == "remove" else rest)), rtol=1e-5, atol=1e-10
                    )
        changes = torch.stack([logits([i]) - clean for i in active]).sum(0)
        found = lines.loc[(lines["edit"] == "remove") & lines["kl_sum"].notna()].iloc[0]
        np.testing.assert_allclose(found["kl_sum"], exact_kl(clean, clean + changes), rtol=1e-5)


def table(kl: list[float], whole: float, prompt: int = 0) -> pd.DataFrame:
    n = len(kl)
    return pd.DataFrame(
        {"target_prompt": prompt, "target_position": 3, "n": range(1, n + 1), "n_active": n, "kl": kl, "kl_all": whole}
    )


def test_counts_and_curves_by_hand():
    lines = table([0.1, 0.6, 0.4, 1.0], 1.0)
    assert [counts(lines, share, False)["n"].item() for share in (0.05, 0.5, 0.6, 0.9)] == [1, 2, 2, 4]
    kept = table([0.9, 0.5, 0.2, 0.0], 1.0)
    np.testing.assert_allclose(shares(kept, True), [0.1, 0.5, 0.8, 1.0])
    assert counts(kept, 0.8, True)["n"].item() == 3
    both = pd.concat([lines, table([0.0, 3.0], 3.0, prompt=1)])
    found = curve(both, False).set_index("share_of_latents")["value"]
    assert found[0.0] == 0 and found[1.0] == pytest.approx(1) and len(found) == len(GRID)
    assert found[0.5] == pytest.approx((0.6 + 0.0) / 4)
    np.testing.assert_allclose(curve(kept, True)["value"].iloc[[0, 5, -1]], [0, 0.1, 1], atol=1e-12)


def test_greedy_beats_random_order_and_result_roundtrips(planted, tmp_path):
    by = {(g["edit"], g["order"]): g for g in planted.groups}
    assert (
        by["remove", "effect"]["n50"].value <= by["remove", "size"]["n50"].value < by["remove", "random"]["n50"].value
    )
    assert by["remove", "size"]["KL of Σ / KL of all"].value == pytest.approx(1, rel=1e-6)
    planted.write(tmp_path)
    assert Concentration.load(tmp_path).frame.equals(planted.frame)
    assert "n50" in planted.table()


def test_zero_tokens_raise():
    hf, sae = planted_model()
    with pytest.raises(ResultError, match="n_tokens 0"):
        causal_concentration(hf, PROMPTS, sae, n_tokens=0)
