"""Intervals and comparisons against plain loops over deletions and numbers computed by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.concept_ablation.curves import Curve, selectivity
from diagnostics.concept_ablation.equal_effects import NOT_REACHED, REACHED, WITHIN, equal_effects
from diagnostics.concept_ablation.summary import curves, mean_over_concepts, summaries
from diagnostics.statistics.jackknife import from_deletions, jackknife
from diagnostics.statistics.measures import fieller, mean
from diagnostics.statistics.tables import with_ends
from interventions.errors import ResultError

COUNTS = (1, 10, 100)


def table(
    seed=0, concepts=("a", "b"), saes=("one", "two"), arms=("selected", "random", "keep"), n=40, per_group=1
) -> pd.DataFrame:
    """Log-normal effects of 40 texts in groups; the texts of concept b that have it are those of a that have not."""
    generator, lines = np.random.default_rng(seed), []
    for sae in saes:
        for c, concept in enumerate(concepts):
            for arm in arms:
                for k, count in enumerate((0, *COUNTS) if arm == "keep" else COUNTS):
                    for text in range(n):
                        draw = generator.lognormal(size=3) * (k + 1)
                        lines.append(
                            {
                                "sae": sae, "layer": 3, "point": "resid_post", "data": "d", "concept": concept,
                                "ranking": "probe", "arm": arm, "count": count, "n_latents": count, "text": text,
                                "group": text // per_group * per_group,
                                "own": (text < n // 2) == (c == 0), "n_tokens": 10, "n_edited": k, "kl": draw[0],
                                "delta_square": 4.0 * k, "coherence": 0.5, "target_fall": draw[1], "other_square": draw[2],
                                "class_probe_clean": 2.0, "class_probe": 2.0 - generator.normal(0.5),
                            }
                        )  # fmt: skip
    return pd.DataFrame(lines).sample(frac=1, random_state=0)  # the order of rows does not matter


@pytest.mark.filterwarnings("ignore:an interval from")  # groups are fewer than texts
@pytest.mark.parametrize("per_group", [1, 3])  # texts alone; groups, of which one has texts of both kinds
@pytest.mark.parametrize("form", ["kl", "logit", "probe"])
def test_estimates_match_a_loop_over_deletions(form, per_group):
    frame = table(per_group=per_group, n=60)
    frame.loc[(frame["text"] == 7) & (frame["count"] == 100), "kl"] = np.nan  # at another N than is asked about here
    (curve,) = (c for c in curves(frame, [form]) if (c.sae, c.concept, c.arm) == ("two", "b", "selected"))
    rows = frame.query("sae == 'two' and concept == 'b' and arm == 'selected' and count == 10")
    rows = rows[rows["own"]] if form == "logit" else rows
    own = rows["own"].to_numpy()
    fall = (rows["class_probe_clean"] - rows["class_probe"]).to_numpy()
    columns = {
        "kl": (rows["kl"].to_numpy(), rows["kl"].to_numpy()),
        "logit": (rows["target_fall"].to_numpy(), rows["other_square"].to_numpy()),
        "probe": (fall, np.abs(fall)),
    }[form]

    def effects(keep):
        other = own if form == "logit" else ~own
        intended, collateral = columns[0][keep & own].mean(), columns[1][keep & other].mean()
        return intended, np.sqrt(collateral) if form == "logit" else collateral

    group = rows["group"].to_numpy()
    other = own if form == "logit" else ~own
    for part, side in ((0, own), (1, other)):  # one effect: its own texts alone

        def alone(keep, part=part, side=side):
            values = columns[part][side][keep].mean()
            return np.sqrt(values) if form == "logit" and part else values

        got, with_loop = curve.estimate(1, part), jackknife(alone, int(side.sum()), group[side])
        assert (got.n_rows, got.n_prompts, got.df) == (side.sum(), len(set(group[side])), with_loop.df)
        assert (got.value, got.low, got.high) == pytest.approx((with_loop.value, with_loop.low, with_loop.high))
    got = curve.selectivity(1)
    with_loop = jackknife(lambda keep: effects(keep)[0] / sum(effects(keep)), len(rows), group)
    few = min(len(set(group[side])) for side in (own, other))
    wider = stats.t.ppf(0.975, few - 1) / stats.t.ppf(0.975, len(set(group)) - 1)
    assert (got.value, got.se, got.df) == pytest.approx((with_loop.value, with_loop.se, few - 1))
    assert got.high - got.value == pytest.approx(wider * (with_loop.high - with_loop.value))
    for texts, side in zip(curve.texts, (own, other), strict=True):
        assert sorted(texts) == sorted(rows["text"][side])
    assert curve.groups.tolist() == sorted(set(group))


def test_two_texts_with_the_concept_give_no_interval():
    """With 20 texts without it: no interval for the intended effect or for statistics of both effects."""
    frame = table(arms=("selected",), saes=("one",), concepts=("a",), n=40)
    (c,) = curves(frame[(frame["text"] < 2) | (frame["text"] >= 20)], ["kl"])
    assert c.estimate(0, 1).df == 19 and np.isfinite(c.estimate(0, 1).low)
    assert (c.estimate(0, 0).n_prompts, c.estimate(0, 0).n_rows) == (2, 2)
    for estimate in (c.estimate(0, 0), c.selectivity(0), c.log_ratio(0)):
        assert np.isfinite(estimate.value) and np.isnan([estimate.low, estimate.high, estimate.df]).all()
    assert c.ratio(0).kind == "none"
    assert all(e.collateral is None or np.isnan(e.collateral.low) for e in equal_effects([c]))


def test_nonfinite_effect_affects_only_its_own_point():
    """One text of one SAE at one N: that point is the mean of the other texts, and no SAE drops out of the comparison."""
    frame = table(arms=("selected",))
    at = (frame["sae"] == "one") & (frame["concept"] == "a") & (frame["text"] == 3) & (frame["count"] == 100)
    frame.loc[at, "kl"] = np.nan
    whole, broken = curves(table(arms=("selected",)), ["kl"]), curves(frame, ["kl"])
    rows = frame[(frame["sae"] == "one") & (frame["concept"] == "a") & (frame["count"] == 100) & frame["own"]]
    for a, b in zip(whole, broken, strict=True):
        first = (a.sae, a.concept) == ("one", "a")
        assert np.array_equal(a.value, b.value) is not first and np.array_equal(a.value[:2], b.value[:2])
        if first:
            assert b.value[2, 0] == pytest.approx(rows["kl"].dropna().mean()) and np.isfinite(b.estimate(2, 0).low)
    frame.loc[at | (frame["sae"].eq("one") & frame["concept"].eq("a") & frame["count"].eq(100)), "kl"] = np.nan
    lost = equal_effects(curves(frame, ["kl"]))  # a whole point of one curve is gone
    assert [e.level > 0 for e in lost if e.data != "all"] == [True] * 4
    assert all(np.isfinite(e.collateral.value) for e in lost if e.collateral is not None)


def test_ratio_on_the_same_texts_has_fiellers_interval():
    texts = np.arange(24)
    x = np.random.default_rng(0).lognormal(size=(24, 2))
    whole = (x.sum(0) - x) / 23
    curve = _curve(value=x.mean(0)[None], texts=texts, without=whole[:, None])
    found, known = curve.ratio(0), fieller(x[:, 0], x[:, 1], texts)
    assert (found.value, found.low, found.high) == pytest.approx((known.value, known.low, known.high))


def test_negative_intended_effect_counts_as_0_without_interval():
    assert selectivity(np.array([[-1.0, 2.0], [1.0, 3.0]])).tolist() == [0, 0.25]
    without = np.random.default_rng(0).normal([-1.0, 2.0], 0.01, size=(24, 1, 2))
    found = _curve(value=np.array([[-1.0, 2.0]]), texts=np.arange(24), without=without).selectivity(0)
    assert found.value == 0 and np.isnan(found.low)


@pytest.mark.filterwarnings("ignore:an interval from")
def test_mean_over_concepts_jackknifes_shared_groups():
    frame = table(per_group=2)
    own = [c for c in curves(frame, ["kl"]) if c.sae == "one" and c.arm == "selected"]
    (pooled,) = mean_over_concepts(own)
    assert pooled.concept == "mean of 2" and (pooled.n_texts, len(pooled.groups)) == (40, 20)
    assert pooled.sides.all()  # each group has the one concept and not the other
    rows = frame.query("sae == 'one' and arm == 'selected' and count == 100")

    def collateral(keep):
        kept = rows[keep]
        return np.mean([kept.query("concept == @c and not own")["kl"].mean() for c in ("a", "b")])

    known = jackknife(collateral, len(rows), rows["group"].to_numpy())
    found = pooled.estimate(2, 1)
    assert (found.value, found.low, found.high) == pytest.approx((known.value, known.low, known.high))


def test_summaries_hold_doses_and_recovered_shares():
    frame = table()
    groups = summaries(frame, curves(frame, ["kl"]))
    assert len(groups) == 2 * 2 * (3 + 3 + 4)
    (line,) = (g for g in groups if (g["sae"], g["concept"], g["arm"], g["count"]) == ("one", "a", "keep", 10))
    assert (line["delta_square"], line["edited_others"], line["n_latents"]) == (8.0, 0.2, 10)
    rows = frame.query("sae == 'one' and concept == 'a' and arm == 'keep' and own")
    kept, none = (rows.query("count == @n")["kl"].mean() for n in (10, 0))
    assert line["recovered"].value == pytest.approx(1 - kept / none) and line["selectivity"] is None
    plain = pd.DataFrame([with_ends(g) for g in groups])
    assert len(plain) == len(groups) and {"intended_low", "ratio_kind", "recovered_high"} <= set(plain)
    known = mean(rows.query("count == 10")["kl"].to_numpy(), rows.query("count == 10")["text"].to_numpy())
    assert line["intended"].value == pytest.approx(known.value)


def test_a_table_without_a_row_raises():
    frame = table(arms=("selected",))
    with pytest.raises(ResultError, match="not every text has a line at every N"):
        curves(frame.drop(frame.index[0]), ["kl"])


def _curve(sae="one", concept="a", arm="selected", counts=(1,), value=None, texts=None, without=None) -> Curve:
    value = np.asarray(value, dtype=float)
    texts = np.arange(24) if texts is None else texts
    without = np.broadcast_to(value, (len(texts), *value.shape)) if without is None else without
    sides = np.ones((len(texts), 2), dtype=bool)
    head = (sae, "3.resid_post", "d", concept, "probe", arm, "kl", np.array(counts))
    return Curve(*head, value, (texts, texts), texts, sides, without)


def test_collateral_at_equal_intended_effect_by_hand():
    """Largest intended effects 8 and 4: the level is half of their mean, 3. Linear in log N between 1 and 100."""
    strong = _curve("strong", counts=(1, 100), value=[[2.0, 1.0], [8.0, 7.0]])
    weak = _curve("weak", counts=(1, 100), value=[[4.0, 1.0], [1.0, 9.0]])
    floor = _curve("weak", arm="random", counts=(1, 100), value=[[0.1, 0.1], [2.9, 5.0]])
    found = {(e.sae, e.data, e.arm): e for e in equal_effects([strong, weak, floor])}
    one, other, none = (found[key] for key in (("strong", "d", "selected"), ("weak", "d", "selected"), ("weak", "d", "random")))  # fmt: skip
    assert one.level == other.level == none.level == 3
    assert one.collateral.value == pytest.approx(2.0) and one.count == pytest.approx(100 ** (1 / 6))
    assert one.status == REACHED and one.selectivity.value == pytest.approx(3 / 5)
    assert other.collateral.value == pytest.approx(0.75) and (other.status, other.count) == (WITHIN, 1)
    assert none.status == NOT_REACHED and none.collateral is None
    mean_of = found["strong", "all", "selected"]
    assert mean_of.concept == "mean of 1" and mean_of.selectivity.value == pytest.approx(3 / 5)
    assert found["weak", "all", "random"].status == "not reached in 1"


def test_interval_at_equal_intended_effect_is_the_jackknife():
    frame = table(arms=("selected",))
    some = curves(frame, ["kl"])
    found = equal_effects(some)
    for e in found:
        if e.data == "all" or e.status != REACHED:
            continue
        (c,) = (c for c in some if (c.sae, c.concept) == (e.sae, e.concept))
        by_text = []
        for v in c.without:
            k = int(np.argmax(np.r_[0, v[:, 0]] >= e.level))
            (x0, y0), (x1, y1) = np.vstack([[0, 0], v])[k - 1 : k + 1]
            by_text.append(y0 + (e.level - x0) / (x1 - x0) * (y1 - y0))
        known = from_deletions(e.collateral.value, np.array(by_text), np.ones(len(by_text)))
        assert (e.collateral.se, e.collateral.df) == (pytest.approx(known.se), 19)
        half = stats.t.ppf(0.975, 19) * known.se
        assert (e.collateral.low, e.collateral.high) == pytest.approx((known.value - half, known.value + half))
    assert sum(e.status == REACHED for e in found) >= 3


def test_means_are_over_concepts_that_every_sae_reaches():
    reach = [[1.0, 1.0], [4.0, 1.0]]
    value = {("weak", "b"): [[0.0, 1.0], [0.1, 1.0]]}
    places = [(sae, concept) for sae in ("one", "two", "weak") for concept in ("a", "b")]
    some = [_curve(*place, counts=(1, 2), value=value.get(place, reach)) for place in places]
    means = [e for e in equal_effects(some) if e.data == "all"]
    assert [(e.sae, e.concept, e.status) for e in means] == [(s, "mean of 1", REACHED) for s in ("one", "two", "weak")]
    assert equal_effects([_curve(arm="random", counts=(1, 2), value=reach)]) == []
    for share in (0, 1):
        with pytest.raises(ResultError, match="expected one between 0 and 1"):
            equal_effects(some, share)
