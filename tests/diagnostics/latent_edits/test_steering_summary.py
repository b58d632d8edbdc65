"""Curves that climb, that rise and fall, and that are nothing but noise."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.latent_edits.steering_summary import means, peaks
from diagnostics.statistics.measures import mean

COEFFICIENTS = (0.5, 1.0, 2.0, 4.0)


def table(curve: dict[float, float], noise: float = 0.3, clean: float = 0.2, seed: int = 0) -> pd.DataFrame:
    """24 prompts × 3 latents of a curve: every prompt has a level and, at each coefficient, noise of its own."""
    generator = np.random.default_rng(seed)
    own, level = generator.normal(size=(24, len(curve))), generator.normal(size=24)
    return pd.DataFrame(
        [
            {"sae": "one", "condition": "single", "coefficient": c, "target_prompt": p, "target_position": 4, "latent": latent,
             "probability": value + level[p] + noise * own[p, k], "clean_probability": clean + level[p],
             **dict.fromkeys(("delta_norm", "kl", "logit_change", "entropy"), 1.0)}
            for p in range(24) for latent in range(3) for k, (c, value) in enumerate(curve.items())
        ]
    )  # fmt: skip


def peak(frame: pd.DataFrame) -> pd.Series:
    (line,) = (row for _, row in peaks(frame).iterrows())
    return line


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.6, 1.2, 1.8, 2.4), (4.0, False)), ((1.0, 2.0, 1.2, 0.6), (1.0, True)), ((0.1, 0.0, -0.4, -1.0), (0.0, False))],
    ids=["climbs", "rises and falls", "falls"],
)
def test_planted_curves(values, expected):
    line = peak(table(dict(zip(COEFFICIENTS, values, strict=True))))
    assert (line["peak"], line["inverted U"], line["rows"]) == (*expected, 72)


def test_unclear_peak_leaves_inverted_u_undecided():
    for values, clean in (((0.3, 1.0, 0.8, 0.9), 0.2), ((0.3, 1.0, 0.5, 0.2), 0.95)):
        line = peak(table(dict(zip(COEFFICIENTS, values, strict=True)), clean=clean))
        assert line["inverted U"] is None and 0 < line["peak"] < 4


def test_noise_is_rarely_an_inverted_u():
    found = [peak(table(dict.fromkeys(COEFFICIENTS, 0.0), clean=0.0, seed=seed)) for seed in range(60)]
    inside = [line for line in found if 0 < line["peak"] < 4]
    assert len(inside) > 20  # the largest mean alone would say so of all of these
    assert sum(line["inverted U"] is True for line in found) <= 6  # 5 % of 60, and two standard deviations


def test_peak_minus_last_is_jackknifed_within_one_sign():
    frame = table({-4.0: 0.4, -2.0: 2.0, -1.0: 1.0, 1.0: 0.5, 4.0: 1.9})
    line, by = peak(frame), frame.set_index(["target_prompt", "latent"])
    values = {c: lines["probability"] for c, lines in by.groupby("coefficient")}
    prompt = values[-2.0].index.get_level_values(0).to_numpy()
    known = mean((values[-2.0] - values[-4.0]).to_numpy(), prompt)
    found = line["peak − last"]
    assert (found.value, found.low, found.high) == pytest.approx((known.value, known.low, known.high))
    assert line["inverted U"] is True and line["at the last"] == pytest.approx(values[-4.0].mean())


def test_incomplete_curves_drop_from_peaks_not_from_means():
    frame = table(dict(zip(COEFFICIENTS, (1.0, 2.0, 1.2, 0.6), strict=True))).iloc[1:]
    assert peak(frame)["rows"] == 71
    assert {line["coefficient"]: line["rows"] for line in means(frame)} == {0.5: 71, 1.0: 72, 2.0: 72, 4.0: 72}
