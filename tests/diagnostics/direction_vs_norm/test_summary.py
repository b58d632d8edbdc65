"""The summary against tables whose answers are known."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diagnostics.direction_vs_norm.design import COLUMNS, EDITS
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.direction_vs_norm.summary import NOTE, short_frame
from diagnostics.running.clean import CONTEXTS
from interventions.files import jsonable
from tests.tiny import VOCAB

FLOOR = 1e-12
LOG_VOCAB = math.log(VOCAB)
PLACE = {"model": "trained", "layer": 0, "point": "resid_post", "context": "in_place"}


def planted(kl: dict[str, np.ndarray], floor: float = FLOOR, **place) -> pd.DataFrame:
    """Rows of pairs of 15 prompts with these KLs for some edits (1 for all others), half in JS and 3 times in direct effect."""
    n = len(next(iter(kl.values())))
    pair = np.arange(n)
    same = {
        **PLACE, **place, "pair": pair, "pair_set": "random", "target_prompt": pair % 15, "target_position": pair,
        "source_prompt": (pair + 1 + pair // 15) % 15, "source_position": pair, "target_norm": 2.0, "source_norm": 2.0 + pair,
        "norm_of_median": 1.0, "cosine": np.cos(pair), "delta_angle": 0.5, "clean_entropy": 1.0, "top1_changed": pair % 4 == 0,
    }  # fmt: skip
    parts = []
    for number, edit in enumerate(EDITS["random"]):
        values = np.full(n, floor) if edit == "self" else np.broadcast_to(kl.get(edit, 1.0), n)
        own = {"edit": edit, "delta_norm": 1.0 + number, "kl": values, "js": values / 2, "kl_direct": 3 * values}
        parts.append(pd.DataFrame(same | own))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def of(*frames: pd.DataFrame, **said) -> DirectionNorm:
    frame = pd.concat(frames, ignore_index=True)
    labels = list(dict.fromkeys(frame.model))
    provenance = {
        "context": ["in_place", "single_token"],
        "vocab": VOCAB,
        "sites": list(dict.fromkeys(f"{layer}.{point}" for layer, point in zip(frame.layer, frame.point, strict=True))),
        "null_models": [label for label in labels if label != "trained"],
        "drawn": {label: {"pair_sets": {}, "pairs_dropped": {}} for label in labels},
        "rows_dropped": {},
        "why_hooks": None,
    }
    return DirectionNorm(frame, [[1]], provenance | said)


def shuffled(values) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.asarray(values, dtype=float))


def test_planted_ratios_shares_and_doses_are_recovered():
    norm = shuffled(0.1 * (1 + np.arange(41)))
    ratio = shuffled(np.exp(np.linspace(-1, 3, 41)))  # median e; 10 below 1, one at 1
    (group,) = of(planted({"norm": norm, "direction": ratio * norm, "placebo_token": 0.25 + 0 * norm})).groups
    assert {name: group[name] for name in PLACE} == PLACE
    assert group["pair_set"] == "random"
    assert (group["n_pairs"], group["n_prompts"]) == (41, 15)
    assert group["noise_floor"] == pytest.approx(FLOOR)
    median = group["ratios"]["direction ÷ norm"]["median"]
    assert median.estimate.value == pytest.approx(math.e)
    assert median.estimate.low < math.e < median.estimate.high
    assert (median.estimate.bound, median.n_censored, median.n_undefined, median.n_rows) == (False, 0, 0, 41)
    means = group["ratios"]["direction ÷ norm"]["of_means"]
    assert means.value == pytest.approx((ratio * norm).mean() / norm.mean())
    assert np.isnan([means.low, means.high, means.se]).all()
    assert means.influence == pytest.approx((ratio * norm).max() / (ratio * norm).sum())
    over_placebo = group["ratios"]["direction ÷ placebo_token"]
    assert over_placebo["of_means"].value == pytest.approx((ratio * norm).mean() / 0.25)
    assert over_placebo["median"].estimate.value == pytest.approx(np.median(ratio * norm) / 0.25)
    assert group["share_direction_above_norm"].value == pytest.approx((ratio > 1).mean())
    edits = group["edits"]
    assert edits["norm"]["n"] == 41
    assert edits["norm"]["mean_kl"].value == pytest.approx(norm.mean())
    assert np.isnan(edits["norm"]["mean_kl"].low) and edits["norm"]["mean_kl"].influence == pytest.approx(41 / 861)
    assert edits["norm"]["median_kl"].value == pytest.approx(2.1)
    assert edits["norm"]["median_kl"].low < 2.1 < edits["norm"]["median_kl"].high
    assert edits["norm"]["mean_js"].value == pytest.approx(norm.mean() / 2)
    assert edits["norm"]["direct_over_total"].value == pytest.approx(3)
    assert (edits["norm"]["direct_over_total"].low, edits["norm"]["direct_over_total"].high) == pytest.approx((3, 3))
    assert edits["norm"]["top1_changed"].value == pytest.approx(11 / 41)
    for number, edit in enumerate(EDITS["random"]):
        assert edits[edit]["mean_dose"].value == pytest.approx((1 + number) / 2)
    assert edits["norm"]["error_of_mean_kl"] == pytest.approx(2 * math.sqrt(norm.mean() * FLOOR) + FLOOR)
    assert group["n_saturated"] == (ratio * norm > LOG_VOCAB).sum()


def test_planted_correlations_are_recovered():
    pair = np.arange(41)
    rising, falling = (1 - np.cos(pair)) * 3 + 1, 5 - np.log((2.0 + pair) / 2)
    (group,) = of(planted({"direction": rising, "norm": falling})).groups
    for kind in ("pearson", "spearman"):
        assert group["correlations"][f"1 − cos, KL of direction ({kind})"].value == pytest.approx(1)
        assert group["correlations"][f"|log norm ratio|, KL of norm ({kind})"].value == pytest.approx(-1)


def test_a_denominator_within_the_noise_floor_bounds_the_ratio():
    direction = shuffled(np.linspace(0.5, 1.5, 41))
    (group,) = of(planted({"direction": direction, "norm": np.full(41, FLOOR / 10)})).groups
    median, means = (group["ratios"]["direction ÷ norm"][name] for name in ("median", "of_means"))
    assert median.n_censored == 41
    for estimate in (median.estimate, means):
        assert estimate.bound
        assert estimate.value == pytest.approx(1 / FLOOR)
    assert 0 < median.estimate.low < median.estimate.value and median.estimate.high == math.inf
    assert np.isnan([means.low, means.high]).all()


@pytest.mark.parametrize("floor", [0.0, 1e-12, 1e-6, 0.2])
def test_ratios_are_bounded_by_the_noise_floor(floor):
    rng = np.random.default_rng(1)
    kl = {edit: rng.lognormal(-4, 4, 41) for edit in ("direction", "norm", "placebo_token", "placebo_norm")}
    kl["norm"][::2] = 0
    kl["placebo_norm"][:] = 0
    (group,) = of(planted(kl, floor)).groups
    for name, ratio in group["ratios"].items():
        top = kl.get(name.split(" ÷ ")[0], np.ones(41))
        for estimate in (ratio["median"].estimate, ratio["of_means"]):
            if floor:
                assert estimate.value <= top.max() / floor * (1 + 1e-9), name
            if np.isposinf(estimate.value):
                assert estimate.bound and floor == 0, name


def test_direct_over_total_is_bounded_by_the_noise_floor():
    norm = shuffled(0.1 * (1 + np.arange(41)))
    frame = planted({"norm": norm, "placebo_norm": np.full(41, FLOOR / 10)})
    direct = np.where(frame.edit == "norm", 2 + 0 * frame.kl, frame.kl_direct)
    direct[frame.edit == "placebo_norm"] = 0.5
    (group,) = of(frame.assign(kl_direct=direct)).groups
    found = {edit: values["direct_over_total"] for edit, values in group["edits"].items()}
    assert found["norm"].value == pytest.approx(np.median(2 / norm))
    assert found["norm"].low < found["norm"].value < found["norm"].high
    assert not found["norm"].bound
    assert found["direction"].value == pytest.approx(3)
    assert found["placebo_norm"].bound
    assert found["placebo_norm"].value == pytest.approx(0.5 / FLOOR)
    assert found["placebo_norm"].high == math.inf


def test_noise_floor_is_per_model_layer_point_and_context():
    places = (
        (1e-9, {}),
        (1e-3, {"context": "single_token"}),
        (1e-7, {"layer": 2}),
        (1e-2, {"point": "attn_out"}),
        (1e-8, {"model": "random 0"}),
    )
    run = of(*(planted({"norm": np.full(41, 1e-5)}, floor, **place) for floor, place in places))
    assert [{name: g[name] for name in PLACE} for g in run.groups] == [{**PLACE, **place} for _, place in places]
    assert [g["noise_floor"] for g in run.groups] == pytest.approx([floor for floor, _ in places])
    bounds = [g["ratios"]["direction ÷ norm"]["of_means"].bound for g in run.groups]
    assert bounds == [False, True, False, True, False]


def test_rows_without_self_swaps_have_a_floor_of_zero():
    frame = planted({"norm": np.ones(41)})
    assert [g["noise_floor"] for g in of(frame[frame.edit != "self"]).groups] == [0]


@pytest.mark.parametrize("edit", ["direction", "norm", "placebo_norm", "full"])
def test_dropped_row_keeps_the_rest_of_its_pair(edit):
    norm = shuffled(0.1 * (1 + np.arange(41)))
    frame = planted({"norm": norm, "direction": 2 * norm})
    (group,) = of(frame[~((frame.edit == edit) & (frame.pair == 3))]).groups
    assert group["edits"][edit]["n"] == 40
    assert group["edits"]["self"]["n"] == 41
    assert group["ratios"]["direction ÷ norm"]["median"].estimate.value == pytest.approx(2)
    assert group["ratios"]["direction ÷ norm"]["median"].n_rows == (40 if edit in ("direction", "norm") else 41)
    assert group["share_direction_above_norm"].value == 1  # of the pairs that have both


def two_contexts() -> DirectionNorm:
    norm = shuffled(0.1 * (1 + np.arange(41)))
    return of(
        *(
            planted({"norm": norm * scale, "direction": 3 * norm}, layer=layer, context=context)
            for layer, scale in ((0, 1), (7, 0))
            for context in CONTEXTS
        )
    )


def test_summary_and_table_have_a_line_per_layer_and_context():
    run = two_contexts()
    found, text = run.summary(), run.table()
    assert list(zip(found.layer, found.context, strict=True)) == [(n, context) for n in (0, 7) for context in CONTEXTS]
    assert found["pairs"].tolist() == [41] * 4 and found["prompts"].tolist() == [15] * 4
    # Each pair counts half for both of its prompts.
    sizes = np.bincount(np.r_[np.arange(41) % 15, (np.arange(41) + 1 + np.arange(41) // 15) % 15]) / 2
    np.testing.assert_allclose(found.n_effective, 41**2 / (sizes**2).sum())
    np.testing.assert_allclose(found.kl_direction, 3 * 2.1)
    assert ((found.kl_direction_low < found.kl_direction) & (found.kl_direction < found.kl_direction_high)).all()
    for name in ("median direction ÷ norm", "mean direction ÷ norm"):
        np.testing.assert_allclose(found[name], [3, 3, 6.3 / FLOOR, 6.3 / FLOOR])
    assert found["median direction ÷ norm_bound"].fillna(False).tolist() == [False, False, True, True]
    np.testing.assert_allclose(found.dose_norm, 1)
    np.testing.assert_allclose(found.direction_above_norm, 1)
    np.testing.assert_allclose(found.mean_kl_direction, 3 * 2.1)
    np.testing.assert_allclose(found.mean_kl_direction_influence, 41 / 861)
    assert "mean_kl_direction_low" not in found
    assert run.summary("same_norm").empty
    lines = text.splitlines()
    rows = [line for line in lines if line.split()[:1] and line.split()[0] in ("0", "7")]
    assert [line.split()[:2] for line in rows] == [
        [n, context] for n in "07" for context in ("in-place", "single-token")
    ]
    assert " ".join(text.split()).startswith(" ".join(run.finding().split())) and "resid_post:" in lines
    assert ["≥" in line for line in rows] == [False, False, True, True]
    assert "nan" not in text.lower() and " ".join(NOTE.split()) in " ".join(text.split())
    assert list(run.tables()) == run.points
    read = json.loads(json.dumps(jsonable(run.as_dict()), allow_nan=False))["summary"]
    medians = [g["ratios"]["direction ÷ norm"]["median"] for g in read]
    assert [median["n_censored"] for median in medians] == [0, 0, 41, 41]
    assert medians[2]["estimate"]["high"] is None


def test_table_reports_short_pair_sets_and_dropped_pairs():
    sites = {"3.resid_post": {"asked": 9, "exist": 8, "used": 8}, "5.resid_post": {"asked": 9, "exist": 9, "used": 9}}
    sets = {"random": {"3.resid_post": {"asked": 9, "used": 8}}, "same_norm": sites}
    said = {"drawn": {"trained": {"pair_sets": sets, "pairs_dropped": {"sink": 1}}}, "why_hooks": ["no keys"]}
    run = two_contexts()
    text, less = run.table(), replace(run, provenance=run.provenance | said).table()
    for line in (
        "fewer pairs than asked: same_norm 8 of 9 at 3.resid_post",
        "full forward passes in place of the fast path: no keys",
        "pairs dropped (trained): 1 (sink)",
    ):
        assert line in less.splitlines() and line.split(":")[0] not in text


def with_nulls() -> DirectionNorm:
    """direction ÷ norm of 3 where trained; of 2, 8 and 4 in randomly initialised models, ÷ token placebo of 1.5, 6 and 3 norms."""
    norm = shuffled(0.1 * (1 + np.arange(41)))
    kinds = {"trained": 3, "random 0": 2, "random 1": 8, "random 2": 4}
    frames = [
        planted({"norm": norm, "direction": ratio * norm, "placebo_token": 2 * norm}, layer=layer, model=model)
        for model, ratio in kinds.items()
        for layer in (1, 4)
    ]
    return of(*frames)


def test_randomly_initialised_models_are_shown_as_a_range():
    run = with_nulls()
    assert run.null_models == ["random 0", "random 1", "random 2"]
    nulls = {label: run.select(model=label) for label in run.null_models}
    found = short_frame(run.select(), nulls)
    assert found.layer.tolist() == [1, 4]
    assert found["median dir÷norm"].tolist() == ["3", "3"]
    assert found["untrained: dir÷norm"].tolist() == ["2 … 8"] * 2
    assert found["dir÷token"].tolist() == ["1 … 4"] * 2
    assert "2 … 8" in run.table() and "2 … 8" in set(run.tables()["resid_post"].to_numpy().ravel())
    alone = short_frame(run.select(), {})
    assert not any("untrained" in name for name in alone)
    assert list(alone) == [name for name in found if name not in ("untrained: dir÷norm", "dir÷token")]
    one = short_frame(run.select(), {"random 0": nulls["random 0"]})
    assert one["untrained: dir÷norm"].tolist() == ["2", "2"]  # a range of one is a number
    pd.testing.assert_series_equal(one.prompts, found.prompts)
