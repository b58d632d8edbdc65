"""Statistics of dose-response rows: ratios, shares and floors planted in a table come back."""

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest

from diagnostics import statistics
from diagnostics.dose.design import EDITS, edit_names
from diagnostics.dose.summary import NOTE, RATIOS, short_frame, summaries, summary_frame
from diagnostics.statistics.tables import PLACEBOS

SIZE = {
    "toward_token": 3.0, "between_tokens": 2.0, "isotropic": 0.5, "norm_up": 0.2, "norm_down": 0.1,
    "steer": 8.0, "steer_placebo_token": 4.0, "steer_placebo_isotropic": 0.25,
}  # fmt: skip
"""KL of each edit at dose 1 of a token whose factor is 1; it goes with the square of the dose"""
DIRECT = {edit: 2.0 + i for i, edit in enumerate(SIZE)}
"""direct over total effect"""
FLOOR = 1e-6
DOSES = (0.1, 0.5)


def planted(models=("trained",), layers=(3,), prompts=24, pairs=48, noise=0.4, size=SIZE, floor=FLOOR) -> pd.DataFrame:
    """Rows whose KL is size · dose² · a factor of the token, the same for all edits; self-swaps do `floor`, one of 48 more."""
    factor = np.exp(noise * np.random.default_rng(0).normal(size=pairs))
    target = np.arange(pairs) % prompts
    rows = []
    lines = [("self", 0.0), *itertools.product(size, DOSES)]
    for model, layer, (edit, dose) in itertools.product(models, layers, lines):
        kl = floor * (1 + 0 * factor) if edit == "self" else size[edit] * dose**2 * factor
        rows.append(
            pd.DataFrame(
                {
                    "model": model, "layer": layer, "point": "resid_post", "context": "in_place",
                    "pair": np.arange(pairs), "edit": edit, "dose": np.float32(dose), "target_prompt": target,
                    "source_prompt": (target + 1 + np.arange(pairs) // prompts) % prompts, "kl": kl, "js": kl / 4,
                    "top1_changed": np.arange(pairs) % 4 == 0, "kl_direct": kl * DIRECT.get(edit, 1.0),
                }
            )
        )  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def group(frame: pd.DataFrame, dose: float, **values) -> dict:
    (found,) = [
        g for g in summaries(frame, ["steer"]) if g["dose"] == dose and all(g[k] == v for k, v in values.items())
    ]
    return found


def test_planted_edits_are_all_edits_of_the_diagnostic():
    assert set(SIZE) == set(edit_names(["steer"]))
    assert {e for pair in RATIOS for e in pair} == set(EDITS)


@pytest.mark.parametrize("dose", DOSES)
def test_planted_ratios_are_recovered_exactly(dose):
    """Token factors are shared by all edits, so each ratio is exact and its interval a point."""
    g = group(planted(), dose)
    given = [("steer", f"steer_{p}") for p in PLACEBOS]
    assert list(g["ratios"]) == [f"{a} ÷ {b}" for a, b in (*RATIOS, *given)]
    for top, bottom in (*RATIOS, *given):
        estimate = g["ratios"][f"{top} ÷ {bottom}"]
        assert estimate.value == pytest.approx(SIZE[top] / SIZE[bottom], rel=1e-9)
        assert (estimate.low, estimate.high) == pytest.approx((estimate.value, estimate.value), rel=1e-6)
        assert (estimate.n_rows, estimate.n_prompts, estimate.bound) == (48, 24, False)
    assert (g["n_tokens"], g["n_prompts"], g["dose"]) == (48, 24, dose)


def test_each_edit_has_its_mean_median_shares_and_error():
    frame = planted()
    for dose in DOSES:
        g = group(frame, dose)
        assert list(g["edits"]) == list(SIZE)
        for edit, found in g["edits"].items():
            rows = frame[(frame.edit == edit) & np.isclose(frame.dose, dose)]
            clusters = rows[["target_prompt", "source_prompt"]].to_numpy(np.int64)
            kl = rows.kl.to_numpy()
            assert found["n"] == 48
            mean, median = found["mean_kl"], found["median_kl"]
            assert mean.value == pytest.approx(kl.mean()) and np.isnan([mean.low, mean.high]).all()
            assert mean.influence == pytest.approx(kl.max() / kl.sum())
            assert median.value == pytest.approx(np.median(kl)) and median == statistics.median(kl, clusters)
            assert {median.low, median.high} < set(kl) and median.low < median.value < median.high
            assert found["mean_js"].value == pytest.approx(kl.mean() / 4)
            assert found["top1_changed"].value == 0.25
            assert found["direct_over_total"].value == pytest.approx(DIRECT[edit], rel=1e-9)
            assert found["error_of_mean_kl"] == pytest.approx(2 * np.sqrt(kl.mean() * FLOOR) + FLOOR)
        assert g["noise_floor"] == pytest.approx(FLOOR)


def test_noise_floor_is_per_model_and_layer():
    frame = planted(models=("trained", "random 0"), layers=(1, 3))
    places = {("trained", 1): 1e-9, ("trained", 3): 1e-6, ("random 0", 1): 1e-3, ("random 0", 3): 0.0}
    for (model, layer), floor in places.items():
        frame.loc[(frame.edit == "self") & (frame.model == model) & (frame.layer == layer), "kl"] = floor
    groups = summaries(frame, ["steer"])
    assert [(g["model"], g["layer"], g["dose"]) for g in groups] == [
        (*place, dose) for place in places for dose in DOSES
    ]
    for g in groups:
        assert g["noise_floor"] == places[g["model"], g["layer"]]
    assert summaries(frame[frame.edit != "self"], ["steer"])[0]["noise_floor"] == 0


def test_ratio_over_an_effect_within_the_floor_is_a_bound():
    g = group(planted(floor=0.2), 0.5)  # isotropic: 0.125 on average, norm_up 0.05
    bounded = g["ratios"]["toward_token ÷ isotropic"]
    assert bounded.bound
    kl = SIZE["toward_token"] * 0.5**2 * np.exp(0.4 * np.random.default_rng(0).normal(size=48))
    assert bounded.value == pytest.approx(np.sqrt(np.sort(kl)[23:25].prod()) / 0.2)  # 48: the geometric midpoint
    assert g["ratios_of_means"]["toward_token ÷ isotropic"].bound
    assert not g["ratios"]["toward_token ÷ between_tokens"].bound
    assert g["edits"]["norm_up"]["direct_over_total"].bound
    assert not g["edits"]["toward_token"]["direct_over_total"].bound


def test_pairs_missing_an_edit_drop_only_out_of_its_ratios():
    frame = planted(noise=1.0)
    lost = (frame.edit == "toward_token") & (frame.pair < 7)
    g = group(frame[~lost], 0.5)
    kl = frame[np.isclose(frame.dose, 0.5)].pivot(index="pair", columns="edit", values="kl")
    ratio = g["ratios"]["toward_token ÷ isotropic"]
    assert ratio.n_rows == 41
    assert ratio.value == pytest.approx((kl.toward_token / kl.isotropic)[7:].median())
    assert g["ratios"]["norm_up ÷ isotropic"].n_rows == 48
    assert (g["edits"]["toward_token"]["n"], g["edits"]["isotropic"]["n"], g["n_tokens"]) == (41, 48, 48)
    without = group(frame[frame.edit != "isotropic"], 0.5)
    assert not any("isotropic" in name.split("_")[-1] and "÷ isotropic" in name for name in without["ratios"])


def test_few_prompts_give_no_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts, known in ((8, False), (12, True)):
            g = group(planted(prompts=prompts), 0.5)
            assert np.isfinite(g["edits"]["isotropic"]["median_kl"].low) == known
            assert g["n_prompts"] == prompts


def test_effects_of_zero_have_a_mean_of_zero():
    g = group(planted(size={**SIZE, "norm_up": 0.0}), 0.5)
    assert g["edits"]["norm_up"]["mean_kl"].value == 0
    assert g["ratios"]["norm_up ÷ isotropic"].value == 0
    nothing = g["edits"]["norm_up"]["direct_over_total"]  # 0/0 in every row
    assert np.isnan(nothing.value) and nothing.n_rows == 0


def test_summary_has_a_line_for_each_edit_with_its_ratios():
    groups = summaries(planted(models=("trained", "random 0")), ["steer"])
    table = summary_frame(groups)
    assert len(table) == 2 * 2 * len(SIZE)
    for row in table.to_dict("records"):
        (g,) = [g for g in groups if (g["model"], g["dose"]) == (row["model"], row["dose"])]
        mean, median = (g["edits"][row["edit"]][name] for name in ("mean_kl", "median_kl"))
        assert (row["mean_kl"], row["mean_kl_influence"]) == (mean.value, mean.influence)
        assert (row["median_kl"], row["median_kl_low"], row["median_kl_high"]) == (
            median.value,
            median.low,
            median.high,
        )
        assert row["n_effective"] == pytest.approx(24)
        for bottom in ("isotropic", "between_tokens", "steer_placebo_token", "steer_placebo_isotropic"):
            estimate = g["ratios"].get(f"{row['edit']} ÷ {bottom}")
            assert row[f"÷ {bottom}"] == pytest.approx(estimate.value if estimate else np.nan, nan_ok=True)
            if estimate:
                assert (row[f"÷ {bottom}_low"], row[f"÷ {bottom}_high"]) == (estimate.low, estimate.high)
                assert row[f"÷ {bottom}, of means"] == g["ratios_of_means"][f"{row['edit']} ÷ {bottom}"].value


def test_the_short_table_puts_untrained_ranges_beside_each_ratio():
    size = {**SIZE, "toward_token": 12.0}
    trained = summaries(planted(), ["steer"])
    nulls = [
        summaries(planted(models=(name,), size=s), ["steer"]) for name, s in (("random 0", SIZE), ("random 1", size))
    ]
    table = short_frame(trained, nulls, ["steer"])
    assert table.dose.tolist() == ["0.1", "0.5"]
    assert table.tokens.tolist() == [48, 48]
    columns = list(table)
    assert columns[:3] == ["layer", "dose", "tokens"]
    assert columns[9:] == [e.replace("_", " ") for e in (*EDITS, "steer")]
    assert [name.strip() for name in columns[3:9]] == [
        "toward token÷between tokens", "untrained", "norm up÷isotropic", "untrained", "steer÷its placebo", "untrained",
    ]  # fmt: skip
    assert len(set(columns)) == len(columns)
    row = table.iloc[1]
    assert str(row["toward token÷between tokens"]).startswith("1.5 [")
    assert row["untrained"] == "1.5 … 6"
    assert str(row["steer÷its placebo"]).startswith("2 [")
    assert row["toward token"] == f"{trained[1]['edits']['toward_token']['median_kl'].value:.3g}"
    plain = short_frame(trained, [], [])
    assert not any(name.startswith("untrained") for name in plain)
    assert "dose" in NOTE and "untrained" in NOTE
