"""Silent latents of two texts, of as many tokens of each, against a count by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.sae_evaluation.shift import shifts
from diagnostics.statistics.estimate import Estimate

D_SAE, SIZES = 400, {"one": np.arange(30) % 4 * 10, "two": np.full(25, 30)}
"""Counted tokens of each prompt: 430 and 750; some prompts of the first have none."""
RNG = np.random.default_rng(0)
FIRES = {
    (sae, text): (RNG.random((len(n), D_SAE)) < RNG.gamma(0.5, 0.1, D_SAE)) & (n > 0)[:, None]
    for sae in ("a", "b")
    for text, n in SIZES.items()
}
"""Whether each latent fires in each prompt."""


def tables() -> tuple[list[dict], pd.DataFrame, pd.DataFrame]:
    groups, deletions, latents = [], [], []
    for (sae, text), fires in FIRES.items():
        there = np.flatnonzero(SIZES[text])
        zero = Estimate(0.0, 0.0, 0.0, 0.0, 10, len(there))
        groups.append(
            {
                "sae": sae,
                "corpus": text,
                "site": "3.resid_post",
                "layer": 3,
                "point": "resid_post",
                **dict.fromkeys(MEASURES, zero),
            }
        )
        columns = {"sae": sae, "corpus": text, "prompt": there, "n_tokens": SIZES[text][there]}
        deletions.append(pd.DataFrame(columns | dict.fromkeys(MEASURES, 0.0)))
        where = [[*np.flatnonzero(column), -1, -1][:2] for column in fires.T]
        latents.append(pd.DataFrame(where, columns=["first_prompt", "second_prompt"]).assign(sae=sae, corpus=text))
    return groups, pd.concat(deletions), pd.concat(latents)


def test_silent_share_uses_similar_token_counts_per_text():
    said = {name: {"site": "3.resid_post"} for name in ("a", "b")}
    lines = {(m["sae"], m["against"]): m for m in shifts(said, *tables())}
    assert list(lines) == [("a", ""), ("b", ""), ("b", "a")]
    # 14 prompts of 30 tokens are no more than the 430 of the first text
    kept = {"one": np.flatnonzero(SIZES["one"]), "two": np.arange(14)}
    assert lines["a", ""]["silent_tokens"] == [430, 420]

    def silent(sae, text, prompts):
        return 1 - FIRES[sae, text][prompts].any(axis=0).mean()

    def error(of, prompts, sizes):
        """The value, its jackknife variance and the effective number of prompts."""
        without = np.array([of(prompts[prompts != p]) for p in prompts])
        n = len(prompts)
        return of(prompts), (n - 1) / n * ((without - without.mean()) ** 2).sum(), sizes.sum() ** 2 / (sizes**2).sum()

    ways = {
        ("a", ""): lambda text, keep: silent("a", text, keep),
        ("b", ""): lambda text, keep: silent("b", text, keep),
        ("b", "a"): lambda text, keep: silent("b", text, keep) - silent("a", text, keep),
    }
    for key, of in ways.items():
        (x, v, n), (y, w, m) = (
            error(lambda keep, t=t, of=of: of(t, keep), kept[t], SIZES[t][kept[t]]) for t in ("one", "two")
        )
        half = stats.t.ppf(0.975, (v + w) ** 2 / (v**2 / (n - 1) + w**2 / (m - 1))) * np.sqrt(v + w)
        found = lines[key]["silent"]
        assert (found.value, found.low, found.high) == pytest.approx((y - x, y - x - half, y - x + half))
        assert half > 0.005
