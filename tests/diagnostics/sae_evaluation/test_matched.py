"""Comparisons at equal L0 and equal FVE: planted sweeps with a known crossing, numpy's interpolation, paired intervals."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.sae_evaluation.matched import COMPARED, counterpart, families, matched
from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.sae_evaluation.sweep_figures import plot_sweeps
from diagnostics.statistics.estimate import Estimate
from tests.diagnostics.drawn import legend, panels, points

G = 30
KS = (16, 32, 64)


def said(score: str, k: int, seed: int = 0, step: int = 100, site: str = "15.resid_post") -> dict:
    recipe = {"k": float(k), "l1": 0.1, "seed": seed, "lr": 0.002}
    metadata = {"recipe": recipe, "architecture": {"score": score}, "training": {"step": step}}
    return {"site": site, "d_sae": 64, "score": score, "selector": {"kind": "topk", "k": k}, "metadata": metadata}


SAES = {f"{score}-k{k}": said(score, k) for score in ("standard", "cosine") for k in KS}
STANDARD, COSINE = families(SAES)


def evaluated(values: dict[str, dict[str, np.ndarray]], n_kl: int = G) -> tuple[list[dict], pd.DataFrame]:
    """Groups and deletions of means over prompts: values[sae][measure], [prompt]. KL and CE are of the first prompts."""
    groups, rows = [], []
    for name, columns in values.items():
        group = {"sae": name, "site": SAES[name]["site"], "layer": 15, "point": "resid_post", "corpus": "one"}
        without = {"sae": name, "corpus": "one", "prompt": np.arange(G), "n_tokens": np.full(G, 10)}
        for measure in COMPARED:
            x = columns.get(measure, np.zeros(G))
            n = n_kl if measure[:2] in ("kl", "ce") else G
            value, without[measure] = x[:n].mean(), np.full(G, x[:n].mean())
            without[measure][:n] = (x[:n].sum() - x[:n]) / (n - 1)
            group[measure] = (
                Estimate(value, np.nan, np.nan, np.nan, 10 * n, n, n_effective=float(n))
                if measure in MEASURES
                else value
            )
        groups.append(group)
        rows.append(pd.DataFrame(without))
    return groups, pd.concat(rows, ignore_index=True)


def noise(*place: int) -> np.ndarray:
    x = np.random.default_rng(place).normal(size=G)
    return x - x.mean()


def planted(slope: float, shared: float = 0.0, own: float = 0.0) -> dict[str, dict[str, np.ndarray]]:
    """FVE = .5 + .1·log2(L0/32) for the one, with `slope` in place of .1 for the other: they cross at L0 = 32."""
    found = {}
    for i, (name, it) in enumerate(SAES.items()):
        k, b = it["selector"]["k"], slope if it["score"] == "cosine" else 0.1
        fve = 0.5 + b * np.log2(k / 32) + shared * noise(0) + own * noise(1, i)
        kl_score = 0.9 + 0.02 * np.log2(k / 32) + (0.01 if it["score"] == "cosine" else 0.0)
        found[name] = {
            "l0": k * (1 + 0.02 * shared * noise(2)),
            "fve": fve,
            "kl_score": kl_score + shared * noise(3) + own * noise(4, i),
            "dead_share": np.full(G, 0.3 if it["score"] == "cosine" else 0.1),
        }
    return found


def compared(values, at=None, n_kl: int = G) -> dict[str, dict]:
    found = list(matched((STANDARD, COSINE), *evaluated(values, n_kl), at))
    assert [(m["reference"], m["family"]) for m in found] == [("standard", "cosine")] * 2
    return {m["axis"]: m for m in found}


def test_planted_sweeps_have_the_planted_differences():
    for l0, expected in ((32, 0.0), (16, -0.05), (64, 0.05), (32 * 2**0.5, 0.025)):
        m = compared(planted(0.15), {"l0": l0, "fve": 0.5})
        assert m["l0"]["fve"].value == pytest.approx(expected, abs=1e-12)
        assert m["l0"]["kl_score"].value == pytest.approx(0.01, abs=1e-12)
        assert m["l0"]["dead_share"].value == pytest.approx(0.2)
        assert m["fve"]["l0"].value == pytest.approx(0, abs=1e-9) and m["fve"]["value"] == 0.5
    # at FVE .55 the one needs L0 = 32·2^(1/2), the other 32·2^(1/3)
    m = compared(planted(0.15), {"fve": 0.55})["fve"]
    assert m["l0"].value == pytest.approx(32 * (2 ** (1 / 3) - 2**0.5))
    assert m["kl_score"].value == pytest.approx(0.01 + 0.02 * (1 / 3 - 1 / 2))
    assert (m["of_family"]["l0"], m["of_reference"]["l0"]) == pytest.approx((32 * 2 ** (1 / 3), 32 * 2**0.5))
    assert "fve" not in m and not m["note"]


def interpolated(values, family, axis: str, q: float, measure: str, keep: np.ndarray) -> float:
    """numpy's interpolation of means over the kept prompts."""
    mean = {m: np.array([values[name][m][keep].mean() for name in family.saes]) for m in ("l0", "fve", measure)}
    x, q = (np.log(mean["l0"]), np.log(q)) if axis == "l0" else (mean["fve"], q)
    return (
        float(np.interp(q, x, mean[measure])) if measure != "l0" else float(np.exp(np.interp(q, x, np.log(mean["l0"]))))
    )


@pytest.mark.parametrize(("axis", "measure"), [("l0", "fve"), ("l0", "kl_score"), ("fve", "kl_score"), ("fve", "l0")])
def test_intervals_jackknife_the_interpolated_difference(axis, measure):
    values = planted(0.13, shared=0.02, own=0.002)
    m = compared(values)[axis]
    ranges = [[values[name][axis].mean() for name in family.saes] for family in (STANDARD, COSINE)]
    low, high = max(map(min, ranges)), min(map(max, ranges))
    assert (m["low"], m["high"]) == pytest.approx((low, high))
    assert m["value"] == pytest.approx(np.sqrt(low * high) if axis == "l0" else (low + high) / 2)

    def difference(keep):
        one, other = (interpolated(values, f, axis, m["value"], measure, keep) for f in (STANDARD, COSINE))
        return other - one

    every = np.ones(G, dtype=bool)
    without = np.array([difference(every & (np.arange(G) != g)) for g in range(G)])
    se = np.sqrt((G - 1) / G * ((without - without.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, G - 1) * se
    assert m[measure].value == pytest.approx(difference(every), abs=1e-12)
    assert (m[measure].low, m[measure].high) == pytest.approx((m[measure].value - half, m[measure].value + half))
    # what prompts add to both sweeps cancels: unpaired the error would be several times as large
    alone = np.array(
        [interpolated(values, COSINE, axis, m["value"], measure, every & (np.arange(G) != g)) for g in range(G)]
    )
    assert se < 0.5 * np.sqrt((G - 1) / G * ((alone - alone.mean()) ** 2).sum()) or measure == "l0"


def test_nothing_is_extrapolated():
    values = planted(0.15)
    for at, axis in (({"l0": 65.0}, "l0"), ({"l0": 15.9}, "l0"), ({"fve": 0.61}, "fve")):
        m = compared(values, at)[axis]
        assert m["note"] == "outside the common range, not extrapolated"
        assert all(np.isnan(m[name].value) for name in COMPARED if name != axis)
    assert compared(values, {"l0": 64.0})["l0"]["kl_score"].value == pytest.approx(0.01)  # its end is inside
    for name in COSINE.saes:
        values[name]["fve"] = values[name]["fve"] + 0.5
    m = compared(values)["fve"]
    assert m["note"] == "no common range: the sweeps have FVE 0.4 to 0.6 and 0.85 to 1.15"
    assert np.isnan(m["value"]) and np.isnan(m["l0"].value)


def test_without_a_rising_sweep_there_is_no_equal_fve():
    values = planted(0.15)
    values["cosine-k64"]["fve"] = values["cosine-k16"]["fve"]
    found = compared(values)
    assert found["fve"]["note"] == "FVE does not rise with L0 in a sweep" and np.isnan(found["fve"]["l0"].value)
    assert np.isfinite(found["l0"]["fve"].value)


def test_few_spliced_prompts_leave_no_interval():
    found = compared(planted(0.15, 0.01, 0.001), n_kl=9)["l0"]
    assert np.isfinite(found["kl_score"].value) and np.isnan(found["kl_score"].low) and found["kl_score"].n_prompts == 9
    assert np.isfinite(found["fve"].low)
    assert found["kl_score"].n_rows == 90


def test_family_members_differ_only_in_sparsity():
    saes = SAES | {f"standard-k{k}-seed1": said("standard", k, seed=1) for k in KS}
    saes |= {f"standard-k{k}/tokens-9": said("standard", k, step=50) for k in KS}
    saes |= {"alone": said("bypass", 16), **{f"late-k{k}": said("standard", k, site="22.resid_post") for k in KS}}
    saes |= {"odd": said("other", 1), "names": said("other", 2)}
    found = {f.name: f.saes for f in families(saes)}
    assert list(found) == ["standard", "cosine", "standard-seed1", "standard/tokens-9", "late", "odd …"]
    assert found["standard-seed1"] == tuple(f"standard-k{k}-seed1" for k in KS) and found["odd …"] == ("odd", "names")
    assert counterpart("cosine-k32", saes) == "standard-k32" and counterpart("standard-k16", saes) is None
    assert counterpart("standard-k32-seed1", saes) == "standard-k16"  # the first of the site
    bare = {name: {"site": "0.resid_post", "score": "inner", "selector": {"kind": "jumprelu"}} for name in "ab"}
    assert [f.saes for f in families(bare)] == [("a", "b")] and counterpart("b", bare) == "a"


def test_figure_shows_saes_and_rings_at_compared_values():
    values = planted(0.15)
    groups, deletions = evaluated(values)
    lines = list(matched((STANDARD, COSINE), groups, deletions, {"l0": 40.0}))
    curves = {f.name: [g for g in groups if g["sae"] in f.saes] for f in (STANDARD, COSINE)}
    provenance = {"model": "m", "model_note": "n", "dtype": "float32", "sink_filter": None, "saes": SAES}
    provenance |= {"texts": {"one": {"name": "one", "prompts": G, "tokens": 99}}}
    figure = plot_sweeps(curves, lines, provenance)
    left, right = panels(figure)
    for ax, (axis, measure) in ((left, ("l0", "fve")), (right, ("fve", "kl_score"))):
        for family in (STANDARD, COSINE):
            expected = [(values[name][axis].mean(), values[name][measure].mean()) for name in family.saes]
            np.testing.assert_allclose(points(ax, family.name)[:, :2], expected)
        (m,) = [m for m in lines if m["axis"] == axis]
        rings = [tuple(line.get_xydata()[0]) for line in ax.lines if line.get_markersize() == 9]
        assert rings == [(m["value"], m[f"of_{side}"][measure]) for side in ("reference", "family")]
    assert legend(figure) == ["standard", "cosine"]
    plt.close("all")
