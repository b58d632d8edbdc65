"""Statistics of the bipolar census: shares of latents and of activation mass that take both signs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from diagnostics.sampling.latents import is_bipolar
from diagnostics.statistics.jackknife import from_deletions
from diagnostics.statistics.tables import few_prompts, where

LATENTS, RANDOM = "latents", "random"
QUARTERS = ("strongest", "second", "third", "weakest")
NOTE = (
    "bipolar: share of latents (of those that fire often enough) of whose firing each sign takes at least 10 %; bipolar mass: share of "
    "Σ|z|‖d‖ that such latents carry; strongest … weakest: bipolar share in quarters of the latents by mass. random: directions at random, "
    "each firing on its largest |projections|, as often as the latent. Intervals: 95 %, over prompts"
)
Latents = Float[ndarray, "latent"]


def bipolar(fired: Latents, positive: Latents, mass: Latents, min_active: int) -> tuple[float, float]:
    """The shares of latents and of mass that are bipolar, among latents that fire on `min_active` tokens; nan where there is none."""
    often = fired >= min_active
    both = often & is_bipolar(fired, positive)
    return _share(both.sum(), often.sum()), _share(mass[both].sum(), mass[often].sum())


def by_quarter(lines: pd.DataFrame, min_active: int) -> list[float]:
    """Bipolar shares in quarters of the latents by falling mass."""
    some = where(lines, lines["fired"] >= min_active).sort_values(by="mass", ascending=False, kind="stable")
    both = is_bipolar(some["fired"].to_numpy(float), some["positive"].to_numpy(float))
    return [_share(part.sum(), len(part)) for part in np.array_split(both, len(QUARTERS))]


@few_prompts()
def census_of(lines: pd.DataFrame, without: pd.DataFrame, said: Mapping[str, Any], usable: int) -> dict[str, Any]:
    """The numbers of one SAE, or of its random directions."""
    least, sizes = said["min_active"], without["n_tokens"].to_numpy()
    columns = {name: lines[name].to_numpy(float) for name in ("fired", "positive", "mass")}
    whole = bipolar(columns["fired"], columns["positive"], columns["mass"], least)
    found = {
        name: from_deletions(value, without[name].to_numpy(float), sizes, transform="logit")
        for name, value in zip(("bipolar", "bipolar_mass"), whole, strict=True)
    }
    return {
        "latents": len(lines), "counted": int((columns["fired"] >= least).sum()), "L0": float(columns["fired"].sum() / usable), **found,
        **dict(zip(QUARTERS, by_quarter(lines, least), strict=True)),
    }  # fmt: skip


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else np.nan
