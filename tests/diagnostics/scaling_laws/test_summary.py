"""Losses with intervals, ablations paired by seed, equivalents of compute: against numpy and known answers."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from diagnostics.scaling_laws.summary import Measured, ablation_groups, described, equivalent, exit_groups, loss_groups
from interventions.errors import ResultError
from tests.diagnostics.scaling_laws.grids import grid

RNG = np.random.default_rng(0)
N_PROMPTS = 15


def said(saes):
    return {name: {"site": "3.resid_post", "metadata": sae.metadata} for name, sae in saes.items()}


def measured() -> Any:
    """Sums drawn at random, prompts of unequal size."""
    runs = pd.DataFrame(described(said(grid()))).assign(l0=2.0, silent=0.1)
    size = RNG.integers(5, 40, N_PROMPTS)
    text = pd.DataFrame(
        {"prompt": np.arange(N_PROMPTS), "n_tokens": size, "variance": size * RNG.uniform(2, 3, N_PROMPTS)}
    )
    text["n_spliced"] = np.where(text["prompt"] < 12, size - 1, 0)
    for name, scale in (("ce_clean", 3.0), ("kl_zero", 5.0), ("ce_zero", 8.0)):
        text[name] = text["n_spliced"] * scale * RNG.uniform(0.9, 1.1, N_PROMPTS)
    frames = [
        pd.DataFrame(
            {
                "sae": name,
                "prompt": text["prompt"],
                "error": text["variance"] * RNG.uniform(0.2, 0.4, N_PROMPTS),
                "kl": text["n_spliced"] * RNG.uniform(0.2, 0.4, N_PROMPTS),
                "ce": text["ce_clean"] + text["n_spliced"] * RNG.uniform(0.2, 0.4, N_PROMPTS),
            }
        )
        for name in runs["sae"]
    ]
    exits = pd.DataFrame(
        [
            {"layer": i, "prompt": p, "n": n, "ce": n * c}
            for i, c in enumerate((9.0, 4.0, 5.0, 3.0))
            for p, n in enumerate(text["n_spliced"][:12])
        ]
    )
    exits["share"] = np.array([0.4, 0.6, 0.8, 1.0])[exits["layer"]]
    return Measured(runs, pd.concat(frames, ignore_index=True), text, exits)


def test_losses_and_their_intervals():
    m = measured()
    found = {(g["sae"], g["what"]): g["value"] for g in loss_groups(m)}
    text, spliced = m.text, m.text["n_spliced"].sum()
    for name, own in m.frame.groupby("sae"):
        error, variance = own["error"].to_numpy(), text["variance"].to_numpy()
        nmse = found[name, "nmse"]
        assert nmse.value == pytest.approx(error.sum() / variance.sum())
        without = np.array([np.delete(error, i).sum() / np.delete(variance, i).sum() for i in range(N_PROMPTS)])
        se = np.sqrt((N_PROMPTS - 1) / N_PROMPTS * np.square(without - without.mean()).sum())
        assert nmse.se == pytest.approx(se) and nmse.low < nmse.value < nmse.high and nmse.n_prompts == N_PROMPTS
        ce, clean, zero = own["ce"].sum() / spliced, text["ce_clean"].sum() / spliced, text["ce_zero"].sum() / spliced
        assert found[name, "kl"].value == pytest.approx(own["kl"].sum() / spliced) and found[name, "kl"].n_prompts == 12
        assert found[name, "excess_ce"].value == pytest.approx(ce - clean)
        assert found[name, "loss_recovered"].value == pytest.approx((zero - ce) / (zero - clean))
        assert found[name, "compute"].value == pytest.approx(equivalent(ce, np.array([9.0, 4, 5, 3]), m.shares))
    counts = RNG.integers(0, 3, N_PROMPTS)
    errors = np.stack([own["error"] for _, own in m.frame.groupby("sae", sort=False)])
    np.testing.assert_allclose(m.losses(range(len(m.runs)))(counts), errors @ counts / (m.text["variance"] @ counts))
    assert [g["value"].value for g in exit_groups(m)] == pytest.approx([9, 4, 5, 3])


def test_equivalent_compute_is_linear_between_the_best_exits():
    rungs, shares = np.array([9.0, 4.0, 5.0, 3.0]), np.array([0.4, 0.6, 0.8, 1.0])
    known = {9.0: 0.4, 6.5: 0.5, 4.0: 0.6, 3.5: 0.8, 3.0: 1.0, 2.0: 1.0}  # 5 at .8 is worse than 4 at .6, and skipped
    assert {ce: equivalent(ce, rungs, shares) for ce in known} == pytest.approx(known)
    assert np.isnan(equivalent(9.1, rungs, shares)) and np.isnan(equivalent(np.nan, rungs, shares))


def test_ablations_are_paired_by_seed():
    m = measured()
    found = {(g["condition"], g["what"]): g for g in ablation_groups(m)}
    error = m.frame.groupby("sae")["error"].sum()
    name = {
        (r["condition"], r["seed"]): r["sae"] for r in m.runs.to_dict("records") if (r["d_sae"], r["k"]) == (160, 4)
    }
    for condition in ("no AuxK", "Multi-TopK"):
        ratios = [error[name[condition, seed]] / error[name["base", seed]] for seed in (0, 1)]
        g = found[condition, "nmse ratio"]
        assert g["value"].value == pytest.approx(np.exp(np.log(ratios).mean())) and g["seeds"] == 2
        assert [g["seeds_low"], g["seeds_high"]] == pytest.approx(sorted(ratios))
        assert g["value"].low < g["value"].value < g["value"].high
    logs = [np.log(error[name["base", seed]] / m.text["variance"].sum()) for seed in (0, 1)]
    assert found["base", "sd of log NMSE over seeds"]["value"].value == pytest.approx(np.std(logs, ddof=1))
    fitted = m.runs.loc[m.cells()]
    assert len(fitted) == 12 and (fitted["condition"] == "base").all() and (fitted["seed"] == 0).all()


def test_saes_that_form_no_grid_raise():
    saes = said(grid())
    lines = pd.DataFrame(described(saes))
    assert lines["condition"].value_counts().to_dict() == {"base": 13, "no AuxK": 2, "Multi-TopK": 2}
    one, two = list(saes)[:2]
    changed = saes[two]["metadata"]
    with pytest.raises(ResultError, match=f"{two} and .* differ in tokens|differ in tokens"):
        described(saes | {two: saes[two] | {"metadata": changed | {"tokens": 1}}})
    with pytest.raises(ResultError, match="differ in site"):
        described(saes | {two: saes[two] | {"site": "2.resid_post"}})
    with pytest.raises(ResultError, match="says nothing of its recipe"):
        described(saes | {two: saes[two] | {"metadata": {}}})
    with pytest.raises(ResultError, match="have the same width, k, seed and recipe"):
        described(saes | {"again": saes[one]})
    other = described(saes | {two: saes[two] | {"metadata": changed | {"recipe": changed["recipe"] | {"lr": 0.5}}}})
    assert next(line for line in other if line["sae"] == two)["condition"] == "lr 0.5"
