"""Verdicts on latents whose truth is planted: dose alone gives few discoveries, real effects are found, small ones are called small."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import statistics
from diagnostics.whole_dictionary.scan import Scan
from diagnostics.whole_dictionary.verdicts import latent_statistics, p_above

pytestmark = pytest.mark.filterwarnings("ignore:an interval from .* prompts")
NONE = np.zeros(0, dtype=int)


def scan_of(firings) -> Scan:
    nothing = np.full(len(firings), np.nan)
    usable = np.ones((10, 10), dtype=bool)
    return Scan(NONE, NONE, NONE, NONE, NONE, NONE, np.array(firings), nothing, nothing, usable, {})


def rows_of(rng, latents, per, prompts, ratio=1.0, level=0.01, agree=0.7):
    """Log-normal KLs beside placebos; rows of one prompt share much of their difference."""
    latent, n = np.repeat(latents, per), per * len(latents)
    prompt = rng.integers(prompts, size=n)
    shared = rng.standard_normal((max(latents) + 1, prompts))[latent, prompt]
    apart = agree * shared + (1 - agree**2) ** 0.5 * rng.standard_normal(n)
    placebo = level * np.exp(rng.standard_normal(n))
    known = {"latent": latent, "prompt": prompt, "kl": placebo * ratio * np.exp(apart), "kl_placebo": placebo}
    return pd.DataFrame(known | {"kl_direct": placebo, "delta_norm": 1.0, "norm": 10.0, "top1_changed": False})


def test_false_discoveries_are_nominal_and_strong_latents_found():
    rng, found, single, power = np.random.default_rng(0), [], [], []
    for per, prompts in ((100, 60), (25, 40), (100, 11)):
        rows = [rows_of(rng, range(300), per, prompts), rows_of(rng, range(300, 330), per, prompts, ratio=6.0)]
        table = latent_statistics(pd.concat(rows), scan_of([500] * 330), 1e-12, 100)
        noise, strong = table[:300], table[300:]
        single.append(float((noise.p <= 0.05).mean()))
        more = table.verdict == "more than dose"
        power.append(float(more[300:].mean()))
        found.append(more[:300].sum() / max(1, more.sum()))
        assert set(noise.verdict) <= {"more than dose", "no more than dose", "too few prompts"}
        assert strong.over_placebo.median() == pytest.approx(6, rel=0.25)
    assert np.mean(found) <= 0.05 and max(single) <= 0.075, (found, single)
    assert power[0] == 1 and power[1] > 0.8 and power[2] > 0.2, power


def test_p_value_matches_exact_prompt_sign_flips():
    """Against the exact distribution over the 2^14 flips of 14 prompts' sums."""
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(14), rng.integers(1, 5, 14))
    flips = 1 - 2 * (np.arange(2**14)[:, None] >> np.arange(14) & 1)
    for _ in range(20):
        sign = np.where(rng.random(len(prompt)) < 0.7, 1.0, -1.0)
        sums = np.bincount(prompt, sign)
        exact = (flips @ sums >= sums.sum()).mean()
        got = p_above(sign, np.zeros(len(prompt), dtype=int), prompt, 1)[0]
        assert got == pytest.approx(exact, rel=0.35, abs=0.01)


def test_planted_verdicts_and_numbers_match_the_statistics():
    rng = np.random.default_rng(2)
    small, silent = rows_of(rng, [1], 60, 60, level=1e-6), rows_of(rng, [2], 60, 60, level=1e-13)
    few, even = rows_of(rng, [3], 60, 8), rows_of(rng, [5], 60, 60, ratio=0.8)
    one = rows_of(rng, [0], 60, 60, ratio=9.0)
    one.loc[3, "kl_placebo"] = np.nan
    rows = pd.concat([silent, few, one, even, small], ignore_index=True).sample(frac=1, random_state=0)
    table = latent_statistics(rows, scan_of([60, 70, 80, 90, 0, 60]), 1e-12, 61)
    assert table.verdict.tolist() == [
        "more than dose", "small", "silent", "too few prompts", "never active", "no more than dose",
    ]  # fmt: skip
    assert table.short.all() and table.rows.tolist() == [60, 60, 60, 60, 0, 60] and table.prompts[3] == 8
    own = statistics.median(one.kl.to_numpy(), one.prompt.to_numpy())
    assert (table.kl[0], table.kl_low[0], table.kl_high[0]) == (own.value, own.low, own.high)
    known = one.dropna()
    values = known.kl.to_numpy(), known.kl_placebo.to_numpy()
    ratio = statistics.median_ratio(*values, 1e-12, known.prompt.to_numpy())
    assert table.over_placebo_low[0] == ratio.low and table.frequency[1] == 0.7
    assert table.loc[3, ["kl_low", "p", "q"]].isna().all() and table.loc[4, ["kl", "p", "dose"]].isna().all()
    tested = table.p.dropna()
    np.testing.assert_allclose(table.q.dropna(), stats.false_discovery_control(tested))


def test_latents_with_few_placebos_are_not_tested():
    rows = rows_of(np.random.default_rng(3), [0], 60, 60, ratio=50.0)
    rows.loc[rows.prompt.isin(rows.prompt.unique()[9:]), "kl_placebo"] = np.nan
    (line,) = latent_statistics(rows, scan_of([60]), 1e-12, 60).itertuples()
    assert line.verdict == "too few prompts" and np.isnan(line.q) and np.isfinite(line.kl_low)
