"""How the sampled Fisher form converges: its agreement with KL by number of draws, up to the exact second order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.atlas.scores import DRAWS
from diagnostics.results.headlines import Headline

EXACT = "∞"


def draws_frame(groups: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A line for each SAE and number of draws, the last one exact: agreement with KL, and ρ beside the dose's on the same tokens."""
    lines = [
        {
            "SAE": g["sae"], "block": g["layer"], "draws": draws, "ρ": s["rank"], "ρ − dose's": s["over_dose"],
            "recall": s["recall"], "captured": s["captured"], "missed": s["false_negatives"],
        }
        for g in groups for draws, s in g.get("draws", {}).items()
    ]  # fmt: skip
    return pd.DataFrame(lines)


def draws_headline(group: dict[str, Any], where: str) -> Headline:
    """ρ of exact second order, beside those of sampled forms and the number of draws from which on they rank better than the dose."""
    by_draws = group["draws"]
    better = [n for n, s in by_draws.items() if n != EXACT and s["over_dose"].low > 0]
    against = f"better than the dose from {better[0]} on" if better else "not clearly better than the dose"
    sampled = ", ".join(f"{by_draws[str(n)]['rank'].value:.2f} ({n})" for n in DRAWS[::3])
    words = f"rank correlation of exact second order ½Var(JΔ) with KL, {where}"
    return Headline(words, str(by_draws[EXACT]["rank"]), f"sampled, by draws: {sampled}; {against}")


def places(names: Sequence[str]) -> np.ndarray:
    """Where numbers of draws stand on a logarithmic axis, the exact form at its end."""
    return np.array([np.log2(float(n)) if n != EXACT else np.log2(DRAWS[-1]) + 1.5 for n in names])
