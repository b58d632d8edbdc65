"""Statistics of latents added more and more strongly: means by coefficient, and whether an effect rises and falls again."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from diagnostics.results.headlines import Headline
from diagnostics.statistics.tables import each, few_prompts, from_sums, mean_of, median_of, where

NOTE = (
    "peak: coefficient at which the target token's mean probability is largest (0: clean); inverted U: it lies before the last one, and is "
    "clear of both clean and last; means over latents and tokens (KL: median), 95 % intervals over prompts. target: the token that the latent's "
    "direction raises most when it is carried straight to the unembedding"
)
MEANS = {
    "dose": "delta_norm",
    "KL": "kl",
    "logit change": "logit_change",
    "probability": "probability",
    "entropy": "entropy",
}


@few_prompts()
def means(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Means of each SAE, condition and coefficient (of KL the median), with their intervals."""
    return [
        {"sae": sae, "condition": condition, "coefficient": c, "rows": len(lines)}
        | {said: (median_of if name == "kl" else mean_of)(lines, name) for said, name in MEANS.items()}
        for (sae, condition, c), lines in each(frame, ["sae", "condition", "coefficient"])
    ]


@few_prompts()
def peaks(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each SAE and condition: where the target's mean probability is largest, and whether that is an inverted U.

    The clean run stands at coefficient 0; `last` is the coefficient farthest from 0 on the peak's side (of a peak at 0: the largest).
    `inverted U` is True where the peak lies between 0 and `last` and the delete-one-prompt intervals of both differences, peak − clean
    and peak − last, are above 0; None where it lies between and one of them is not; False where it lies at 0 or at `last`. The peak is
    chosen by its mean: of curves that are nothing but noise 1 to 5 % have such intervals (simulated, 3 and 7 coefficients, 24 prompts).
    Over the (latent, token) that have every coefficient.
    """
    found = []
    for (sae, condition), lines in each(frame, ["sae", "condition"]):
        keys = ["target_prompt", "target_position", "latent"]
        table = lines.pivot(index=keys, columns="coefficient", values="probability")
        table[0.0] = lines.groupby(keys)["clean_probability"].first()
        table = table.dropna().sort_index(axis=1)
        mean = {float(c): float(table[c].mean()) for c in table}
        peak = max(mean, key=lambda c: mean[c])
        last = min(mean) if peak < 0 else max(mean)
        rises, falls = (
            from_sums(
                pd.DataFrame({"change": table[peak] - table[other], "one": 1.0}).reset_index(),
                ["change", "one"],
                lambda a, n: a / n,
            )
            for other in (0.0, last)
        )
        clear = True if rises.low > 0 and falls.low > 0 else None
        found.append(
            {"sae": sae, "condition": condition, "rows": len(table), "clean": mean[0.0], "peak": peak, "probability at peak": mean[peak],
             "at the last": mean[last], "peak − clean": rises, "peak − last": falls,
             "inverted U": clear if peak not in (0.0, last) else False}
        )  # fmt: skip
    return pd.DataFrame(found)


def first_numbers(table: pd.DataFrame) -> Iterator[Headline]:
    """Of a table of `peaks`: the rise of the target's probability at its peak, beside the placebo's."""
    for line in where(table, table["condition"].isin(["single", "joint"])).to_dict("records"):
        nulls = table[(table.sae == line["sae"]) & (table.condition == f"{line['condition']}_placebo_token")]
        against = "".join(f"its placebo: {n}" for n in nulls["peak − clean"])
        words = f"rise of the target's probability at its peak (coefficient {line['peak']:g}), {line['condition']}, {line['sae']}"
        yield Headline(words, str(line["peak − clean"]), against)
