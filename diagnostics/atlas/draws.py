"""How the sampled Fisher form converges: its agreement with KL by number of draws, up to the exact second order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.atlas.scores import DRAWS
from diagnostics.results.headlines import Headline

EXACT = "∞"


def draws_frame(groups: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A line for each SAE and number of draws, then exact second order and the dose."""
    lines = [
        {
            "SAE": g["sae"], "block": g["layer"], "draws": draws, "ρ": s["rank"], "recall": s["recall"],
            "captured": s["captured"], "missed": s["false_negatives"],
        }
        for g in groups if g.get("draws")
        for draws, s in [*g["draws"].items(), ("dose ‖z·d‖", g["scores"]["delta_norm"])]
    ]  # fmt: skip
    return pd.DataFrame(lines)


def draws_headline(group: dict[str, Any], where: str) -> Headline:
    """ρ of exact second order, beside those of one draw and of the number of draws from which on the sampled form beats the dose."""
    by_draws, dose = group["draws"], group["scores"]["delta_norm"]["rank"]
    better = [n for n, s in by_draws.items() if n != EXACT and s["rank"].value > dose.value]
    against = f"above the dose's from {better[0]} on" if better else "never above the dose's"
    sampled = ", ".join(f"{by_draws[str(n)]['rank'].value:.2f} ({n})" for n in DRAWS[::3])
    return Headline(
        f"rank correlation of exact second order ½Var(JΔ) with KL, {where}",
        str(by_draws[EXACT]["rank"]),
        f"sampled, by draws: {sampled}; {against}",
    )


def places(names: Sequence[str]) -> np.ndarray:
    """Where numbers of draws stand on a logarithmic axis, the exact form at its end."""
    return np.array([np.log2(float(n)) if n != EXACT else np.log2(DRAWS[-1]) + 1.5 for n in names])
