"""Statistics of what a latent's two polarities do: mean cosines of logit changes, beside random directions of equal dose."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.statistics.measures import mean, median
from diagnostics.statistics.tables import each, few_prompts, lines_of

NOTE = (
    "cosine: mean over pairs of edits of the cosine of their vocabulary-centred logit changes; latents − this: the latents' less this "
    "direction's, pair by pair. Random directions: one for each latent, with its z and length. KL +, KL −: medians of edits with z > 0 and "
    "z < 0. Intervals: 95 %, over prompts (a pair counts half for each of its two)"
)
_PAIR = ["latent", "target_prompt", "target_position", "source_prompt", "source_position"]


@few_prompts()
def numbers(frame: pd.DataFrame, sae: str, real: str, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Of one SAE's lines: each edit, relation and direction."""
    every = []
    for (edit, relation), lines in each(frame, ["edit", "relation"]):
        own = lines_of(lines, kind=real).assign(own=lambda t: t["cosine"]).set_index(_PAIR)
        for kind in kinds:
            some = lines_of(lines, kind=kind)
            if not len(some):
                continue
            prompts = _both(some)
            found = {
                "sae": sae, "edit": edit, "relation": relation, "kind": kind, "latents": int(some["latent"].nunique()), "pairs": len(some),
                "cosine": mean(some["cosine"].to_numpy(float), prompts),
            }  # fmt: skip
            both = some.set_index(_PAIR).join(own["own"], how="inner").reset_index()
            apart = (both["own"] - both["cosine"]).to_numpy(float)
            found["latents − this"] = mean(apart, _both(both)) if kind != real else None
            for end, sign in (("target", "+"), ("source", "−")):
                kl, prompt = some[f"kl_{end}"].to_numpy(float), some[f"{end}_prompt"].to_numpy(int)
                found[f"KL {sign}"] = median(kl, prompt) if relation == "opposite" else None
            found["dose"] = float((some["delta_norm_target"] + some["delta_norm_source"]).mean() / 2)
            every.append(found)
    return every


def _both(lines: pd.DataFrame) -> np.ndarray:
    """The two prompts of each pair."""
    return np.column_stack([lines["target_prompt"].to_numpy(int), lines["source_prompt"].to_numpy(int)])
