"""Differences between estimates from independent sets of prompts."""

import numpy as np
from scipy import stats

from diagnostics.statistics.estimate import Estimate


def difference_of_independent(first: Estimate, second: Estimate, *, level: float = 0.95) -> Estimate:
    """second − first, of two sets of prompts that were drawn independently, with Welch's interval.

        SE² = SE₁² + SE₂²,   t with SE⁴ / (SE₁⁴/(G₁ − 1) + SE₂⁴/(G₂ − 1)) degrees of freedom,   G: prompts of each

    G counts effective prompts. Both on their own scale (no logarithm), in one unit, which the result has. `n_rows`,
    `n_prompts` and `n_effective` count both. No interval (nan) where one of the two has none. Source: Welch 1947;
    Satterthwaite 1946.
    """
    v1, v2 = first.se**2, second.se**2
    with np.errstate(all="ignore"):
        df = float(np.divide((v1 + v2) ** 2, v1**2 / (first.n_effective - 1) + v2**2 / (second.n_effective - 1)))
    value, se = second.value - first.value, float(np.sqrt(v1 + v2))
    half = 0.0 if se == 0 else float(stats.t.ppf((1 + level) / 2, df)) * se
    size = {name: getattr(first, name) + getattr(second, name) for name in ("n_rows", "n_prompts", "n_effective")}
    return Estimate(value, value - half, value + half, se, **size, df=df)
