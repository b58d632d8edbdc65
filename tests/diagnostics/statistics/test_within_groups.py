import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats

from diagnostics import statistics
from diagnostics.statistics.within_groups import GroupSums, ratio_from_deletions
from interventions.errors import ResultError

WRONG = (ResultError, TypeCheckError)  # the second where types are checked at run time
ROUNDING = {"rel": 1e-8, "abs": 1e-10}  # sums of products of order 1, and what a subtraction of two of them leaves


def drawn(seed, n_rows=240, n_groups=4, n_prompts=12, gaps=True):
    """Rows of y, a, b, with ids that have gaps; group 10 has no row of the last two prompts."""
    rng = np.random.default_rng(seed)
    group, prompt = 10 + 3 * rng.integers(0, n_groups, n_rows), 5 * rng.integers(0, n_prompts, n_rows)
    if gaps:
        prompt[group == 10] = 5 * rng.integers(0, n_prompts - 2, (group == 10).sum())
    a = rng.normal(size=n_rows) + group
    b = 0.5 * a + rng.normal(size=n_rows) + 0.1 * prompt
    y = 2 * a - b + rng.normal(size=n_rows) + 100 * group
    return pd.DataFrame({"y": y, "a": a, "b": b, "group": group, "prompt": prompt, "w": rng.integers(1, 4, n_rows)})


def of(frame, weight=None):
    columns = {name: frame[name].to_numpy() for name in ("y", "a", "b")}
    w = None if weight is None else frame[weight].to_numpy(dtype=float)
    return GroupSums.of(columns, frame["group"].to_numpy(), frame["prompt"].to_numpy(), w)


def deletions(frame):
    """The rows, and the rows without each prompt."""
    return [frame, *(frame[frame.prompt != g] for g in np.unique(frame.prompt))]


def least_squares(frame, on, group_weight=None):
    """Slopes with a dummy for each group, rows of a group counted `group_weight` times."""
    dummies = pd.get_dummies(frame["group"]).to_numpy(dtype=float)
    x = np.column_stack([frame[list(on)].to_numpy(), dummies])
    root = np.ones(len(frame)) if group_weight is None else np.sqrt(frame["group"].map(group_weight).to_numpy())
    return np.linalg.lstsq(x * root[:, None], frame["y"].to_numpy() * root, rcond=None)[0][: len(on)]


def test_slopes_are_least_squares_with_each_prompt_left_out():
    frame = drawn(0)
    within = of(frame)
    assert (within.n_prompts, within.n_rows, list(within.groups)) == (12, 240, [10, 13, 16, 19])
    for on in (["a"], ["a", "b"], ["b", "a"]):
        got, expected = within.slopes("y", on), [least_squares(rows, on) for rows in deletions(frame)]
        assert got.shape == (13, len(on)) and got == pytest.approx(np.array(expected), **ROUNDING)
    times = {10: 0.5, 13: 2.0, 16: 7.0, 19: 1.0}
    got = within.slopes("y", ["a", "b"], group_weight=np.array(list(times.values())))
    assert got == pytest.approx(
        np.array([least_squares(rows, ["a", "b"], times) for rows in deletions(frame)]), **ROUNDING
    )


def test_group_slopes_match_separate_fits():
    frame = drawn(1)
    got = of(frame).slopes_each("y", ["a", "b"])
    assert got.shape == (13, 4, 2)
    for d, rows in enumerate(deletions(frame)):
        for g, name in enumerate((10, 13, 16, 19)):
            assert got[d, g] == pytest.approx(least_squares(rows[rows.group == name], ["a", "b"]), **ROUNDING)


def test_correlations_match_each_group_and_deletion():
    frame = drawn(2)
    within = of(frame)
    for x, y in (("y", "a"), ("a", "b"), ("b", "b")):
        got = within.correlation(x, y)
        expected = [[some[x].corr(some[y]) for _, some in rows.groupby("group")] for rows in deletions(frame)]
        assert got.shape == (13, 4) and got == pytest.approx(np.array(expected), **ROUNDING)


def test_weights_act_as_repetitions():
    frame = drawn(4)
    repeated = frame.loc[frame.index.repeat(frame.w)]
    weighed, plain = of(frame, weight="w"), of(repeated)
    for got, expected in (
        (weighed.n, plain.n),
        (weighed.scale, plain.scale),
        (weighed.products, plain.products),
        (weighed.slopes("y", ["a", "b"]), plain.slopes("y", ["a", "b"])),
        (weighed.slopes_each("y", ["b"]), plain.slopes_each("y", ["b"])),
        (weighed.correlation("y", "b"), plain.correlation("y", "b")),
    ):
        assert got == pytest.approx(expected, **ROUNDING)
    assert (weighed.n_rows, plain.n_rows) == (240, len(repeated)) and weighed.present.sum() == 240
    assert weighed.slopes("y", ["a"])[0] != pytest.approx(of(frame).slopes("y", ["a"])[0], rel=1e-3)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), unit=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
def test_units_shifts_and_row_order_do_not_matter(seed, unit, shift):
    frame = drawn(seed, n_rows=120)
    within = of(frame)
    moved = frame.assign(y=frame.y * unit + shift, a=frame.a + shift).sample(frac=1, random_state=seed % 1000)
    other = of(moved)
    loose = {"rel": 1e-6, "abs": 1e-8}
    assert other.correlation("y", "a") == pytest.approx(within.correlation("y", "a"), **loose)
    # A shift of 1e3 beside a spread of 1e-6 leaves 7 digits of y.
    near = {"rel": 1e-5, "abs": 1e-5 * unit + 1e-10 * abs(shift)}
    assert other.slopes("y", ["a", "b"]) == pytest.approx(unit * within.slopes("y", ["a", "b"]), **near)
    assert other.slopes("a", ["y"]) == pytest.approx(within.slopes("a", ["y"]) / unit, rel=1e-5, abs=1e-5 / unit)


def test_constant_columns_have_no_correlation_or_slope():
    frame = drawn(5, gaps=False)
    frame.loc[frame.group == 16, "a"] = 1 / 3
    frame.loc[(frame.group == 13) & (frame.prompt != 25), "a"] = 0.1  # constant without prompt 25 alone
    frame.loc[(frame.group == 13) & (frame.prompt == 25), "a"] = np.arange(
        (frame.prompt[frame.group == 13] == 25).sum()
    )
    within = of(frame)
    unknown = np.isnan(within.correlation("y", "a"))
    at = 1 + list(np.unique(frame.prompt)).index(25)
    assert unknown[:, 2].all() and not unknown[:, [0, 3]].any()
    assert (np.flatnonzero(unknown[:, 1]) == [at]).all()
    each = within.slopes_each("y", ["a", "b"])
    assert (np.isnan(each).all(axis=2) == unknown).all() and (np.isnan(each).any(axis=2) == unknown).all()
    assert np.isfinite(within.slopes_each("y", ["b"])).all()
    # With one slope for all, the others decide it.
    assert within.slopes("y", ["a"])[0] == pytest.approx(least_squares(frame, ["a"]), **ROUNDING)
    level = frame.assign(a=7.0)
    assert np.isnan(of(level).slopes("y", ["a", "b"])).all() and np.isnan(of(level).correlation("a", "a")).all()
    assert of(level).slopes("y", ["b"]) == pytest.approx(of(frame).slopes("y", ["b"]), **ROUNDING)


@pytest.mark.parametrize("seed", range(20))
def test_a_constant_with_rounding_error_has_no_slope(seed):
    """Sums less sums leave of a constant's variance a number near 1e-17, of either sign."""
    rng = np.random.default_rng(seed)
    group, prompt = np.repeat([0, 1], 30), rng.integers(0, 12, 60)
    a, b = np.where(group == 1, rng.random(), rng.normal(size=60)), rng.normal(size=60)
    within = GroupSums.of({"y": rng.normal(size=60), "a": a, "b": b}, group, prompt)
    for on in (["a"], ["b", "a"]):
        slopes = within.slopes_each("y", on)
        assert np.isnan(slopes[:, 1]).all() and np.isfinite(slopes[:, 0]).all()
    same = GroupSums.of({"y": b, "a": np.full(60, rng.random())}, group, prompt)
    assert np.isnan(same.slopes("y", ["a"])).all()


def test_collinear_columns_have_no_slopes():
    frame = drawn(6)
    frame["b"] = 3 - 2 * frame.a
    assert np.isnan(of(frame).slopes("y", ["a", "b"])).all()
    assert of(frame).correlation("a", "b") == pytest.approx(-1, abs=1e-12)
    frame["b"] = 3 - 2 * frame.a + 1e-3 * np.random.default_rng(0).normal(size=240)
    assert of(frame).slopes("y", ["a", "b"])[0] == pytest.approx(least_squares(frame, ["a", "b"]), rel=1e-5)


def test_group_emptied_by_a_deletion_has_no_statistics():
    frame = drawn(7)
    frame.loc[frame.group == 19, "prompt"] = 15
    within = of(frame)
    at = 1 + list(np.unique(frame.prompt)).index(15)
    assert within.n[at, 3] == 0 and (within.products[at, 3] == 0).all()
    assert np.isnan(within.correlation("y", "a")[at, 3]) and np.isnan(within.slopes_each("y", ["a"])[at, 3, 0])
    rows = frame[frame.prompt != 15]
    assert within.slopes("y", ["a", "b"])[at] == pytest.approx(least_squares(rows, ["a", "b"]), **ROUNDING)


def test_estimate_matches_the_jackknife():
    frame = drawn(8, n_prompts=26)
    within, ids = of(frame), frame.prompt.to_numpy()
    slope = within.slopes("y", ["a", "b"])[:, 1]
    got = within.estimate(slope)
    expected = statistics.jackknife(lambda keep: least_squares(frame[keep], ["a", "b"])[1], len(frame), ids)
    assert (got.n_rows, got.n_prompts, got.df) == (240, 26, expected.df)
    for field in ("value", "low", "high", "se"):
        assert getattr(got, field) == pytest.approx(getattr(expected, field), **ROUNDING)
    above = within.estimate(np.exp(slope), transform="log")
    assert (above.low, above.high) == (
        pytest.approx(np.exp(expected.low), rel=1e-8),
        pytest.approx(np.exp(expected.high), rel=1e-8),
    )
    assert np.isnan(within.estimate(np.where(np.arange(27) == 4, np.nan, slope)).low)


def test_ratio_matches_fieller_of_the_joint_jackknife():
    frame = drawn(9, n_prompts=26)
    within, ids = of(frame), frame.prompt.to_numpy()
    slopes = within.slopes("y", ["a", "b"])
    theta, covariance, df = statistics.jackknife_covariance(
        lambda keep: least_squares(frame[keep], ["a", "b"]), len(frame), ids
    )
    parts = (covariance[0, 0], covariance[0, 1], covariance[1, 1])
    for level in (0.95, 0.5):
        t = stats.t.ppf((1 + level) / 2, df)
        expected = statistics.fieller_from(*(float(x) for x in (*theta, *parts, t)), n_rows=240, n_prompts=26)
        got = ratio_from_deletions(slopes[:, 0], slopes[:, 1], within.sizes, level)
        assert (got.kind, got.n_rows, got.n_prompts) == ("bounded", 240, 26) == (expected.kind, 240, 26)
        assert (got.value, got.low, got.high) == pytest.approx((expected.value, expected.low, expected.high), rel=1e-7)
    assert within.ratio(slopes[:, 0], slopes[:, 1]) == ratio_from_deletions(slopes[:, 0], slopes[:, 1], within.sizes)
    noise = slopes[:, 1] - slopes[0, 1]  # a denominator of exactly 0
    assert within.ratio(slopes[:, 0], noise).kind in ("exclusive", "everything")
    few = of(drawn(9, n_prompts=9))
    assert few.ratio(*few.slopes("y", ["a", "b"]).T).kind == "none"


def test_each_matches_the_jackknife_within_the_group():
    frame = drawn(10, n_prompts=22)
    frame = frame[~((frame.group == 16) & (frame.prompt > 40))]  # 9 prompts: no standard error
    within = of(frame)
    value, se, df = within.each(within.correlation("y", "a"))
    for g, name in enumerate(within.groups):
        some = frame[frame.group == name]
        effective = 1 / (some.prompt.value_counts(normalize=True) ** 2).sum()
        ids = some.prompt.to_numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer than 20 prompts
            expected = statistics.jackknife(lambda keep, s=some: s[keep]["y"].corr(s[keep]["a"]), len(some), ids)
        assert value[g] == pytest.approx(expected.value, **ROUNDING) and df[g] == pytest.approx(effective - 1)
        assert (effective >= 10) == np.isfinite(se[g])
        assert se[g] == pytest.approx(expected.se, **ROUNDING, nan_ok=True)
    assert df[0] > 9 and df[1] > 9 and np.isnan(se[2])
    gone = within.correlation("y", "a")
    gone[1, 1] = np.nan
    assert np.isnan(within.each(gone).se[1]) and within.each(gone).value[1] == value[1]
    # A deletion of a prompt that the group has no row of decides nothing.
    gone = within.correlation("y", "a")
    gone[-1, 0] = np.nan
    assert within.present[-1, 0] == 0 and within.each(gone).se[0] == se[0]


def test_one_prompt_and_one_row():
    within = GroupSums.of({"y": np.array([1.0])}, np.array([3]), np.array([8]))
    assert (within.n == [[1], [0]]).all() and np.isnan(within.correlation("y", "y")).all()
    assert np.isnan(within.each(within.correlation("y", "y")).se).all()


def test_invalid_arguments_raise():
    y, ids = np.arange(4.0), np.zeros(4, dtype=int)
    with pytest.raises(WRONG):
        GroupSums.of({"y": y}, ids[:3], ids)
    with pytest.raises(WRONG):
        GroupSums.of({"y": y}, ids, ids, np.ones(3))
    with pytest.raises(ResultError, match="expected one a row"):
        GroupSums.of({"y": y[:0]}, ids[:0], ids[:0])
    with pytest.raises(ResultError, match="2 of 4 rows have an entry that is not finite"):
        GroupSums.of({"y": np.array([0, np.nan, 1, 2]), "a": np.array([0, np.nan, np.inf, 2])}, ids, ids)
    for w in (0.0, -1.0, np.nan):
        with pytest.raises(ResultError, match="a weight is not above 0"):
            GroupSums.of({"y": y}, ids, ids, np.array([1, 1, 1, w]))
