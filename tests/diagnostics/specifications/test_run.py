"""Claims under every choice: known ratios and slopes planted in synthetic rows come back; what is drawn is the table."""

import functools
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex

from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.figures.looks import COLOURS
from diagnostics.specifications.design import CLAIMS, COMPARISONS, DEPTHS, FACTORS, METRICS
from diagnostics.specifications.result import Specifications
from diagnostics.specifications.run import specification_curve
from interventions import ResultError
from tests.diagnostics.drawn import caption
from tests.simulations import MANY, agrees, simulation

N_LAYERS = 7
LAYERS = (0, 1, 2, 3, 4, 5, 6)
"""depths 0, 1/6 | 1/3, 1/2 | 2/3, 5/6 | the last, left out"""
THIRDS = {"early": (0, 1), "middle": (2, 3), "late": (4, 5)}
LOG = {
    "direction": lambda d: 1.0 + 1.5 * d,
    "norm": lambda d: -1.0 - 0.5 * d,
    "placebo_direction": lambda d: 0.3 - 0.2 * d,
    "placebo_norm": lambda d: -0.6 + 0.9 * d,
    "placebo_token": lambda d: 5.0 + 0 * d,
    "full": lambda d: 6.0 + 0 * d,
}
"""logarithm of each edit's median effect (top-1 changed: mean) by depth (0 at the first block, 1 at the last)"""
METRIC_LOG = {"kl": 0.0, "js": -1.0, "top1_changed": -4.0}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def provenance(**changes) -> dict:
    """What a run says of itself."""
    return {
        "model": "planted", "model_note": None, "norm": "RMSNorm", "dtype": "float32", "n_layers": N_LAYERS, "prompts": 24,
        "text": {"name": "text"}, "sites": [f"{layer}.resid_post" for layer in LAYERS], "context": ["in_place"],
        "horizon": 1, "sink_filter": None, "seed": 3, "null_models": [], "pair_sets": ["random"], "vocab": 97,
        "path": {"0.resid_post": "replay"}, "replay_delta": 1e-5, **changes,
    }  # fmt: skip


def planted(
    *, layers=LAYERS, contexts=("in_place",), models=("trained",), pairs=60, prompts=24, log=LOG, noise=0.0,
    sinks=0, floor=0.0, seed=0, **changes,
) -> DirectionNorm:  # fmt: skip
    """Rows whose effects are around exp(LOG): with noise 0 each row is just that. sinks: so many pairs of norm 20 × median,
    whose direction patch does a hundred times as much. floor: what self-swaps do."""
    rng, pair, rows = np.random.default_rng(seed), np.arange(pairs), []
    target = pair % prompts
    same = {
        "point": "resid_post", "pair_set": "random", "pair": pair, "target_prompt": target,
        "source_prompt": (target + 1 + pair // prompts) % prompts, "norm_of_median": np.where(pair < sinks, 20.0, 2.0),
    }  # fmt: skip
    for model, layer, context in itertools.product(models, layers, contexts):
        for edit in (*log, "self"):
            own = np.exp(noise * rng.normal(size=pairs) - noise**2 / 2)
            own = own * np.where((pair < sinks) & (edit == "direction"), 100.0, 1.0)
            mean = None if edit == "self" else log[edit](layer / (N_LAYERS - 1))
            effects = {
                name: own * (floor if mean is None else np.exp(mean + more)) for name, more in METRIC_LOG.items()
            }
            rows.append(
                pd.DataFrame(same | {"model": model, "layer": layer, "context": context, "edit": edit} | effects)
            )
    known = {"context": list(contexts), "null_models": [m for m in models if m != "trained"], **changes}
    return DirectionNorm(pd.concat(rows, ignore_index=True), [[1, 2]] * prompts, provenance(**known))


def expected(comparison: str, depth: float) -> float:
    """The planted log ratio at a depth."""
    top, bottom = COMPARISONS[comparison]
    return sum(LOG[edit](depth) for edit in top) - sum(LOG[edit](depth) for edit in bottom)


def slope(comparison: str) -> float:
    return expected(comparison, 1.0) - expected(comparison, 0.0)


def pick(frame: pd.DataFrame, **values) -> pd.DataFrame:
    for name, value in values.items():
        frame = frame[frame[name.replace("_", " ") if name == "sink_filter" else name] == value]
    return frame


# Known ratios


def test_comparisons_follow_the_protocol():
    """Numerators and denominators, written out independently."""
    assert expected("patch ÷ patch", 0.5) == LOG["direction"](0.5) - LOG["norm"](0.5)
    assert expected("at equal distance", 0.5) == LOG["placebo_norm"](0.5) - LOG["norm"](0.5)
    own = (LOG["direction"](0.5) - LOG["placebo_direction"](0.5)) - (LOG["norm"](0.5) - LOG["placebo_norm"](0.5))
    assert expected("over own placebos", 0.5) == pytest.approx(own)


def test_planted_ratios_and_slopes_are_recovered():
    frame = specification_curve({"text": planted()}).frame
    for row in frame[frame.claim == "direction"].itertuples():
        logs = [expected(row.comparison, layer / (N_LAYERS - 1)) for layer in THIRDS[row.depth]]
        assert row.value == pytest.approx(np.exp(np.mean(logs)), rel=1e-9)
        assert (row.low, row.high) == pytest.approx((row.value, row.value), rel=1e-6)  # all rows alike
        assert (row.n_pairs, row.n_prompts) == (60, 24)
    for row in frame[frame.claim == "deeper"].itertuples():
        assert row.value == pytest.approx(np.exp(slope(row.comparison)), rel=1e-9)
    assert (frame[frame.claim == "deeper"].depth == "").all()


def test_medians_over_pairs_average_logs_over_blocks():
    """Uneven rows: a pair's log ratios averaged over the blocks of a third, then the median over pairs; of shares the ratio of means."""
    run = planted(noise=1.2, seed=5)
    frame = specification_curve({"text": run}).frame
    rows = run.frame
    for metric, name in METRICS.items():
        effect = {key: own.to_numpy() for key, own in rows.sort_values("pair").groupby(["layer", "edit"])[metric]}
        if metric == "top1_changed":
            effect = {key: own.mean(keepdims=True) for key, own in effect.items()}
        for comparison, (top, bottom) in COMPARISONS.items():
            log = lambda layer, edits, effect=effect: sum(np.log(effect[layer, e]) for e in edits)  # noqa: E731
            by_layer = np.array(
                [log(layer, top) - log(layer, bottom) for layer in range(N_LAYERS - 1)]
            )  # [layer, pair]
            some = pick(frame, metric=name, comparison=comparison, sink_filter="none")
            for depth, blocks in THIRDS.items():
                (value,) = pick(some, claim="direction", depth=depth).value
                assert value == pytest.approx(np.exp(np.median(by_layer[list(blocks)].mean(0))), rel=1e-9)
            (line,) = pick(some, claim="deeper").itertuples()
            fits = np.polyfit(np.arange(N_LAYERS - 1) / (N_LAYERS - 1), by_layer, 1)[0]
            assert line.value == pytest.approx(np.exp(np.median(fits)), rel=1e-9)
            assert line.low < line.value < line.high
            if metric != "top1_changed":  # ends are values of pairs
                assert np.isclose(np.exp(fits)[:, None], [line.low, line.high]).any(0).all()


def test_the_last_block_is_left_out():
    """After it the final norm makes every norm patch a no-op, so its rows must change nothing."""
    run = planted(noise=0.5)
    wild = run.frame.copy()
    wild.loc[wild.layer == N_LAYERS - 1, list(METRIC_LOG)] *= np.random.default_rng(0).uniform(0, 1e4, (wild.layer == 6).sum())[:, None]  # fmt: skip
    one, other = (
        specification_curve({"text": DirectionNorm(frame, run.tokens, run.provenance)}).frame
        for frame in (run.frame, wild)
    )
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    without = planted(noise=0.5, layers=LAYERS[:-1])
    assert len(specification_curve({"text": without}).frame) == len(one)


def test_only_random_pairs_count():
    run = planted(noise=0.5)
    other = run.frame.assign(pair_set="same_norm", kl=run.frame.kl * 50)
    both = DirectionNorm(pd.concat([other, run.frame], ignore_index=True), run.tokens, run.provenance)
    pd.testing.assert_frame_equal(
        specification_curve({"text": both}).frame, specification_curve({"text": run}).frame, check_exact=True
    )


# Choices


def test_every_combination_of_choices_appears_once():
    texts = {
        name: planted(layers=(0, 3, 5), contexts=("in_place", "single_token"), models=("trained", "random 0"), pairs=30)
        for name in "ab"
    }
    frame = specification_curve(texts).frame
    choices = {
        "text": {"a", "b"},
        "context": {"in place", "single token"},
        "sink filter": {"10 × median", "none"},
        "metric": {"KL", "Jensen-Shannon", "top-1 changed"},
        "comparison": set(COMPARISONS),
        "depth": set(DEPTHS),
    }
    for claim in CLAIMS:
        n = int(np.prod([len(choices[factor]) for factor in FACTORS[claim]]))
        for model in ("trained", "random 0"):
            some = pick(frame, claim=claim, model=model)
            assert len(some) == n == {"direction": 216, "deeper": 72}[claim]
            assert not some.duplicated(list(FACTORS[claim])).any()
            for factor in FACTORS[claim]:
                assert set(some[factor]) == choices[factor]
    assert len(frame) == 2 * (216 + 72)


def test_sink_filter_drops_pairs_of_large_norm():
    """Six pairs have 20 × the median norm, and direction patches with a hundred times the effect."""
    frame = specification_curve({"text": planted(sinks=6)}).frame
    with_, without = (
        pick(frame, claim="direction", comparison="patch ÷ patch", depth="late", sink_filter=choice)
        for choice in ("10 × median", "none")
    )
    truth = np.exp(np.mean([expected("patch ÷ patch", layer / 6) for layer in THIRDS["late"]]))
    np.testing.assert_allclose(with_.value, truth, rtol=1e-9)
    # Six of sixty pairs leave medians where they are, and carry the mean of a share.
    values = without.set_index("metric").value
    np.testing.assert_allclose(values[["KL", "Jensen-Shannon"]], truth, rtol=1e-9)
    assert values["top-1 changed"] == pytest.approx(truth * (6 * 100 + 54) / 60)
    assert (set(with_.n_pairs), set(without.n_pairs)) == ({54}, {60})


def test_filtered_run_has_only_its_own_sink_filter():
    frame = specification_curve({"a": planted(sink_filter=5.0), "b": planted()}).frame
    assert set(frame[frame.text == "a"]["sink filter"]) == {"5 × median"}
    assert set(frame[frame.text == "b"]["sink filter"]) == {"10 × median", "none"}


def test_depths_without_blocks_are_left_out():
    frame = specification_curve({"text": planted(layers=(3, 4, 5))}).frame
    assert set(frame[frame.claim == "direction"].depth) == {"middle", "late"}
    (value,) = pick(
        frame, claim="direction", comparison="patch ÷ patch", depth="middle", metric="KL", sink_filter="none"
    ).value
    assert value == pytest.approx(np.exp(expected("patch ÷ patch", 0.5)))
    (growth,) = pick(frame, claim="deeper", comparison="patch ÷ patch", metric="KL", sink_filter="none").value
    assert growth == pytest.approx(np.exp(slope("patch ÷ patch")))


# What is not known


def test_means_within_the_noise_floor_are_undefined_and_counted():
    """A floor between the norm patch's effect (e^-1.4 at most of KL late) and all others'."""
    log = {**LOG, "norm": lambda d: np.where(d > 0.6, -9.0, 0.0)}
    curve = specification_curve({"text": planted(log=log, floor=np.exp(-6.0))})
    frame = pick(curve.frame, metric="KL")
    late = pick(frame, claim="direction", depth="late")
    assert late.value.isna().all() and late.low.isna().all() and late.high.isna().all()
    assert pick(frame, claim="direction", depth="early").value.notna().all()
    assert pick(frame, claim="deeper").value.isna().all()
    summary = curve.summary().set_index("claim")
    for claim, text in CLAIMS.items():
        some = pick(curve.frame, claim=claim)
        assert summary.loc[text, "specifications"] == len(some)
        assert summary.loc[text, "undefined"] == some.value.isna().sum() > 0
        assert summary.loc[text, "median"] == pytest.approx(some.value.median(), nan_ok=True)
    figure = curve.plot("direction")
    lost = int(pick(curve.frame, claim="direction").value.isna().sum())
    assert f"{lost} undefined (effect within the noise floor)" in caption(figure)


def test_up_to_half_of_effects_may_lie_within_the_floor():
    floor = 1e-3
    run = planted(floor=floor)
    frame = run.frame
    norm = frame.edit == "norm"
    frame.loc[norm & (frame.pair < 29), list(METRIC_LOG)] = 0.0
    some = pick(specification_curve({"text": run}).frame, comparison="patch ÷ patch", claim="direction", depth="late")
    truth = np.exp(np.mean([expected("patch ÷ patch", layer / 6) for layer in THIRDS["late"]]))
    values = some.drop_duplicates("metric").set_index("metric")
    np.testing.assert_allclose(values.value[["KL", "Jensen-Shannon"]], truth, rtol=1e-9)  # 31 of 60 pairs have it
    assert values.high["KL"] == pytest.approx(
        np.exp(np.mean([LOG["direction"](layer / 6) for layer in THIRDS["late"]])) / floor
    )  # the other 29 have the effect of the direction patch over the floor
    frame.loc[norm & (frame.pair < 31), list(METRIC_LOG)] = 0.0
    more = pick(specification_curve({"text": run}).frame, comparison="patch ÷ patch", metric="KL")
    assert more[["value", "low", "high"]].isna().all(axis=None)


def test_share_that_rests_on_one_prompt_has_no_interval():
    run = planted()
    frame = run.frame
    frame.loc[(frame.edit == "norm") & (frame.target_prompt != 0), list(METRIC_LOG)] = (
        0.0  # all of its effect is one prompt's
    )
    some = pick(specification_curve({"text": run}).frame, comparison="patch ÷ patch", metric="top-1 changed")
    assert some.value.notna().all()
    assert some.low.isna().all() and some.high.isna().all()


def test_the_summary_counts_intervals_on_either_side_of_one():
    log = {**LOG, "direction": lambda d: 0.5 - 2.0 * d, "norm": lambda d: 0 * d}
    curve = specification_curve({"text": planted(log=log, models=("trained", "random 0"), noise=0.1)})
    for row in curve.summary().itertuples():
        some = pick(curve.frame, claim={v: k for k, v in CLAIMS.items()}[row.claim], model=row.model)
        assert row.specifications == len(some) and row.undefined == 0
        assert row[6] == pytest.approx((some.low > 1).mean())
        assert row[7] == pytest.approx((some.high < 1).mean())
    trained = pick(curve.frame, model="trained", comparison="patch ÷ patch", claim="direction")
    assert (pick(trained, depth="early").low > 1).all() and (pick(trained, depth="late").high < 1).all()


def test_medians_by_choice_use_only_the_trained_model():
    curve = specification_curve(
        {"a": planted(noise=0.8, sinks=4, models=("trained", "random 0")), "b": planted(noise=0.8, seed=9)}
    )
    for claim in CLAIMS:
        table = curve.by_choice(claim)
        some = pick(curve.frame, claim=claim, model="trained")
        assert list(dict.fromkeys(table.factor)) == list(FACTORS[claim])
        for row in table.itertuples():
            assert row.median == pytest.approx(some[some[row.factor] == row.choice].value.median())
        assert len(table) == sum(some[factor].nunique() for factor in FACTORS[claim])
    assert "over own placebos" in curve.table()
    with pytest.raises(ResultError, match="no claim 'shallower'; known: direction, deeper"):
        curve.plot("shallower")


@simulation
def test_intervals_cover_the_truth():
    """40 pairs of 20 prompts."""
    n, covered = 6 * MANY, dict.fromkeys(CLAIMS, 0)
    truth = {"direction": np.exp(expected("patch ÷ patch", 0.0)), "deeper": np.exp(slope("patch ÷ patch"))}
    for seed in range(n):
        run = planted(noise=0.6, seed=100 + seed, layers=(0, 3, 5), pairs=40, prompts=20, sink_filter=10.0)
        frame = pick(specification_curve({"text": run}).frame, comparison="patch ÷ patch", metric="KL")
        for claim in CLAIMS:
            row = pick(frame, claim=claim).iloc[0]
            covered[claim] += row.low <= truth[claim] <= row.high
            assert 1.2 < row.high / row.low < 100
    assert all(agrees(hits / n, 0.92, 0.98, n) for hits in covered.values())


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "no result; give at least one"),
        (
            {"t": planted(horizon=3)},
            r"t: points \['resid_post'\], horizon 3; expected random pairs, one point, horizon 1",
        ),
        ({"t": planted(horizon="last")}, "horizon last"),
        ({"t": planted(sites=["1.resid_post", "1.attn_out"])}, "expected random pairs, one point"),
        ({"t": planted(pair_sets=["same_norm"])}, "expected random pairs"),
        ({"t": planted(layers=(1, 3, 6))}, "t: 2 blocks below the last; give three or more"),
    ],
)
def test_invalid_results_raise(results, message):
    with pytest.raises(ResultError, match=message):
        specification_curve(results)


# Figures and files


@functools.cache
def curve_of_two() -> Specifications:
    """Claims that hold in some specifications and not in others, with a null and undefined ones."""
    log = {**LOG, "direction": lambda d: -1.2 + 0.5 * d}
    some = {"contexts": ("in_place", "single_token"), "noise": 0.7, "log": log}
    return specification_curve(
        {"one": planted(models=("trained", "random 0"), **some), "other": planted(seed=4, floor=0.25, **some)}
    )


@pytest.mark.parametrize("claim", list(CLAIMS))
def test_plotted_points_match_the_table(claim):
    curve = curve_of_two()
    figure = curve.plot(claim)
    figure.canvas.draw()
    top, bottom = figure.axes
    every = pick(curve.frame, claim=claim)
    known = pick(every, model="trained").dropna(subset="value").sort_values("value", kind="stable")
    n = len(known)
    assert 0 < n < len(pick(every, model="trained"))
    dots, nulls = (c for c in top.collections if isinstance(c, PathCollection))
    x, y = np.asarray(dots.get_offsets()).T
    np.testing.assert_array_equal(x, np.arange(n))
    np.testing.assert_allclose(y, known.value)
    assert (np.diff(y) >= 0).all()
    (bars,) = (c for c in top.collections if isinstance(c, LineCollection))
    ends = np.array(bars.get_segments())
    np.testing.assert_array_equal(ends[:, :, 0], np.arange(n)[:, None] * np.ones(2))
    np.testing.assert_allclose(ends[:, 0, 1], known.low.fillna(known.value))
    np.testing.assert_allclose(ends[:, 1, 1], known.high.fillna(known.value))
    above, below = (known.low > 1).to_numpy(), (known.high < 1).to_numpy()
    colours = [to_hex(c) for c in dots.get_facecolors()]
    assert [c == COLOURS["direction"].lower() for c in colours] == above.tolist()
    assert [c == COLOURS["norm"].lower() for c in colours] == below.tolist()
    # a grey stroke for each specification of the randomly initialised model, over the trained one with the same choices
    factors = list(FACTORS[claim])
    null = pick(every, model="random 0").dropna(subset="value").set_index(factors).value
    drawn = {(int(a), round(float(b), 9)) for a, b in np.asarray(nulls.get_offsets())}
    place = {tuple(row): i for i, row in enumerate(known[factors].itertuples(index=False, name=None))}
    assert drawn == {(place[key], round(value, 9)) for key, value in null.items() if key in place}
    assert drawn
    assert top.get_yscale() == "log"
    assert f"{n} specifications, median {known.value.median():.3g}" in top.get_title(loc="left")
    assert f"above 1 in {above.mean():.0%} (blue), below in {below.mean():.0%} (orange)" in top.get_title(loc="left")
    assert CLAIMS[claim] in top.get_title(loc="left")
    # below: a stroke under each estimate in the line of each of its choices
    labels = [label.get_text() for label in bottom.get_yticklabels()]
    choices = [(factor, choice) for factor in factors for choice in dict.fromkeys(every[factor])]
    assert labels == [choice for _, choice in choices]
    assert {text.get_text() for text in bottom.texts} == set(factors)
    strokes = [np.asarray(c.get_offsets()) for c in bottom.collections]
    for (factor, choice), marks in zip(choices, strokes, strict=True):
        np.testing.assert_array_equal(marks[:, 0], np.flatnonzero(known[factor] == choice))
    assert sum(map(len, strokes)) == n * len(factors)
    for ax, heights in ((top, [y, ends[:, :, 1].ravel()]), (bottom, [m[:, 1] for m in strokes])):
        low, high = ax.get_ylim()
        left, right = ax.get_xlim()
        assert all((low <= h).all() and (h <= high).all() for h in heights)
        assert left <= 0 and n - 1 <= right
    assert "24 prompts of one and other, seed 3, sink filter as chosen. 60 random cross-prompt pairs" in caption(figure)
