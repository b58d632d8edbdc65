"""An SAE's latents in numbers: how many do more than their dose, and how much typical ones do."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from diagnostics.results.headlines import Headline
from diagnostics.statistics.estimate import digits
from diagnostics.statistics.tables import few_prompts, lines_of
from diagnostics.whole_dictionary.verdicts import FALSE_DISCOVERY, SMALL, VERDICTS, over_all

NOTE = (
    "Verdicts, each latent the first that holds from the right: never active; fewer than 10 effective prompts; silent: median KL (interval's end) within ten\n"
    f"noise floors; small: below {SMALL:g} nats; more than dose: KL above its placebos' (sign test by prompt, false discovery rate {FALSE_DISCOVERY:g}); else no more than\n"
    "dose, which is no proof of equality. Medians over rows, of each latent about as many; brackets: 95 % intervals over prompts. Latents are counted, not estimated."
)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""of the latents tested"""


@few_prompts()
def summaries(rows: pd.DataFrame, latents: pd.DataFrame, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Numbers of each SAE."""
    return [
        _group(name, lines_of(rows, sae=name), lines_of(latents, sae=name), provenance) for name in provenance["saes"]
    ]


def _group(name: str, rows: pd.DataFrame, latents: pd.DataFrame, provenance: dict[str, Any]) -> dict[str, Any]:
    notes = provenance["dictionary"][name]
    verdicts = latents.verdict.value_counts()
    floor = notes["noise_floor"] or 0.0
    tested = latents.loc[latents.q.notna()]
    return {
        "sae": name, "layer": int(latents.layer.iloc[0]), "point": str(latents.point.iloc[0]), "latents": len(latents),
        "rows": len(rows), "tokens": notes["tokens"], "prompts": int(rows.prompt.nunique()),
        "tokens_edited": len(rows[["prompt", "position"]].drop_duplicates()),
        "short": int(((latents.firings > 0) & latents.short).sum()), "tested": len(tested),
        "verdicts": {verdict: int(verdicts.get(verdict, 0)) for verdict in VERDICTS},
        "above_dose": int((tested.q <= FALSE_DISCOVERY).sum()), "below_dose": int((tested.over_placebo_high < 1).sum()),
        **over_all(rows, floor),
        "relative_dose": float(tested.dose.median()), "noise_floor": floor,
        **{f"latents_{name}_{at:.0%}": float(tested[name].quantile(at)) for name in ("kl", "over_placebo") for at in QUANTILES},
        "share_below_floor": float((rows.kl <= floor).mean()),
    }  # fmt: skip


def verdicts_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each SAE: its latents by verdict."""
    lines = [
        {
            "SAE": g["sae"],
            "block": g["layer"],
            "latents": g["latents"],
            **g["verdicts"],
            "interval below 1": g["below_dose"],
            "short quota": g["short"],
        }
        for g in groups
    ]
    return pd.DataFrame(lines)


def effects_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each SAE: rows, median KL beside its placebo's, spread over latents."""
    lines = [
        {
            "SAE": g["sae"], "block": g["layer"], "rows": f"{g['rows']:,}", "median ÷ placebo": g["kl_over_placebo"], "median KL": g["kl"],
            "dose": digits(g["relative_dose"], ".2g"), "top-1 changed": g["top1_changed"], "median direct": g["kl_direct"],
            "tokens read": f"{g['tokens']:,}", "latents' ÷ placebo, 5 25 50 75 95 %": " ".join(digits(g[f"latents_over_placebo_{at:.0%}"], ".2f") for at in QUANTILES),
            "floor": f"{g['noise_floor']:.0e}",
        }
        for g in groups
    ]  # fmt: skip
    return pd.DataFrame(lines)


def first_numbers(groups: list[dict[str, Any]]) -> Iterator[Headline]:
    """For each SAE, how many of the latents tested do more than their dose, and the typical ratio."""
    for g in groups:
        where = f"{g['sae']}, block {g['layer']}"
        more = g["verdicts"]["more than dose"]
        words = f"number of latents that do more than their dose, of {g['tested']:,} tested, {where}"
        against = f"false discovery rate {FALSE_DISCOVERY:g}; {g['verdicts']['small'] + g['verdicts']['silent']:,} others are small or silent"
        yield Headline(words, f"{more:,}", against)
        against = f"1: no more than its dose; median KL {g['kl']} nats"
        yield Headline(f"KL of removing a latent ÷ placebo, {where}", str(g["kl_over_placebo"]), against)
