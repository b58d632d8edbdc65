"""Statistics of a comparison of dictionaries: stability over seeds, correlations with alignment, tables."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray

from diagnostics.statistics.estimate import MISSING, Estimate
from diagnostics.statistics.jackknife import jackknife
from diagnostics.statistics.ranks import weighted_spearman
from diagnostics.statistics.tables import few_prompts
from sae_models.sae import SAE

NOTE = (
    "Intervals: 95 % delete-one-prompt jackknife, with matches and quartiles held fixed. MCS and shares of latents have none: a "
    "dictionary's latents are no sample, and training seeds are points. SAEs trained from one seed may share their initialisation and "
    "match more for that reason. Chance: activations on other prompts' tokens; random decoder rows."
)
EFFECTS = {
    "kl": "mean KL of ablating z_i·d_i",
    "kl_over_placebo": "the same over that of the placebo of its norm and angle, turned along the difference of two other tokens",
    "delta_norm": "mean ‖z_i·d_i‖, the dose",
}
"""Effects that alignment is correlated with, over latents."""


def seed_groups(saes: Mapping[str, SAE]) -> dict[str, list[str]]:
    """Groups of SAEs that differ only in their training seed, by the common part of their names.

    Determined from their metadata (architecture, recipe, tokens, text), or, where it is missing, from their names: `cosine` and
    `cosine-seed1`. SAEs without another seed are left out.
    """
    found: dict[str, list[str]] = {}
    for name, sae in saes.items():
        stem, said = re.sub(r"-seed\d+$", "", name), sae.metadata
        known = all(part in said for part in ("architecture", "recipe"))
        recipe = {k: v for k, v in said["recipe"].items() if k != "seed"} if known else {}
        text = (said.get("text") or {}).get("sha256")
        key = (
            json.dumps((said["architecture"], recipe, said.get("tokens"), text), sort_keys=True)
            if known
            else f"name {stem}"
        )
        found.setdefault(key, []).append(name)
    groups: dict[str, list[str]] = {}
    for names in found.values():
        stem = re.sub(r"-seed\d+$", "", names[0])
        if len(names) > 1:
            groups[stem if stem not in groups else f"{stem} ({len(groups)})"] = names
    return groups


def joined_latents(
    latents: pd.DataFrame,
    partners: pd.DataFrame,
    duplicates: pd.DataFrame,
    rows: pd.DataFrame,
    groups: dict[str, list[str]],
) -> pd.DataFrame:
    """The table of latents joined with their pairs, duplicates and ablations."""
    keys = ["sae", "latent"]
    ends = pd.concat([duplicates, duplicates.assign(latent=duplicates["other"])])
    frame = latents.join(_by(ends, "duplicates"), on=keys)
    mate = {name: names for names in groups.values() for name in names}
    seeds = partners.loc[
        [other in mate.get(sae, ()) for sae, other in zip(partners["sae"], partners["other"], strict=True)]
    ]
    for column, some in (("mcs_seeds", seeds), ("mcs_mean", partners)):
        frame = frame.join(_by(some, column, "mcs"), on=keys)
    frame["duplicates"] = frame["duplicates"].fillna(0).astype("int32")
    effects = ["kl", "kl_placebo_token", "kl_placebo_isotropic", "delta_norm", "latent_weight"]
    if len(rows):
        for column in effects:
            frame = frame.join(_by(rows, column, column), on=keys)
        frame = frame.join(_by(rows, "ablated_tokens"), on=keys)
    else:
        frame = frame.assign(**dict.fromkeys(effects, np.float32("nan")), ablated_tokens=0)
    frame["ablated_tokens"] = frame["ablated_tokens"].fillna(0).astype("int32")
    return frame


def _by(table: pd.DataFrame, name: str, column: str | None = None) -> pd.DataFrame:
    """For each latent in a table the mean of a column, or, without one, the number of its lines."""
    groups = table.groupby(["sae", "latent"])
    return pd.DataFrame({name: groups.size() if column is None else groups[column].mean()})


def seed_lines(groups: Mapping[str, Sequence[str]], pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each group of SAEs that differ only in their seed: a value for each ordered pair, and the means."""
    found = []
    for kind, names in groups.items():
        some = [line for line in pairs if line["sae"] in names and line["other"] in names]
        line: dict[str, Any] = {"kind": kind, "saes": list(names)}
        for column in ("mcs", "mcs_null_covariance", "stable_share", "matched_share", "matched_share_null"):
            values = [one[column] for one in some]
            known = [value for value in values if value is not None]  # None: no latent is live
            line |= {column: float(np.mean(known)) if known else None, f"{column}_points": values}
        found.append(line)
    return found


@few_prompts()
def alignment_lines(
    frame: pd.DataFrame, rows: pd.DataFrame, groups: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Correlations of <w_i, d_i>, and of the cosine of w_i and d_i, with MCS and with causal effect; a line an SAE.

    MCS: mean over the SAE's other seeds, or, without any, over all other SAEs; over live latents, without an interval. Effect:
    Spearman over ablated latents, weighted by the number of live latents that each represents (`weighted_spearman`), with a jackknife
    over prompts and the drawn latents held fixed; `ablated_effective` is their effective number (Σw)²/Σw² (Kish). None where one of
    the two does not vary.
    """
    in_groups = {name for names in groups.values() for name in names}
    found = []
    for name, own in frame.groupby("sae", sort=False):
        live = own["fired"].to_numpy() > 0
        mcs = own["mcs_seeds" if name in in_groups else "mcs_mean"].to_numpy(float)
        line: dict[str, Any] = {"sae": name, "against": "other seeds" if name in in_groups else "all other SAEs"}
        for column in ("alignment", "alignment_cosine"):
            x, y = own[column].to_numpy(float)[live], mcs[live]
            line[f"{column}_sd"] = float(np.std(x)) if len(x) else None
            line[f"{column}_mcs_pearson"] = _correlation(x, y, rank=False)
            line[f"{column}_mcs_spearman"] = _correlation(x, y)
            some = rows.loc[rows["sae"] == name] if len(rows) else rows
            for effect in EFFECTS if len(some) else ():
                found_here = _with_effect(own[column].to_numpy(float), some, effect)
                line[f"{column}_{effect}_spearman"] = found_here.as_dict()
        line["latents"] = int(live.sum())
        weight = own.loc[own["ablated_tokens"] > 0, "latent_weight"].to_numpy(float)
        if len(weight):
            line |= {"ablated": len(weight), "ablated_effective": float(weight.sum() ** 2 / (weight**2).sum())}
        found.append(line)
    return found


def _with_effect(score: Float[ndarray, "latent"], rows: pd.DataFrame, effect: str) -> Estimate:
    latent, first, at = np.unique(rows["latent"].to_numpy(), return_index=True, return_inverse=True)
    weight = rows["latent_weight"].to_numpy(float)[first]
    columns = ("kl", "kl_placebo_token") if effect == "kl_over_placebo" else (effect,)
    values = [rows[column].to_numpy(float) for column in columns]

    def statistic(keep: Bool[ndarray, "row"]) -> float:
        count = np.bincount(at[keep], minlength=len(latent))
        sums = [np.bincount(at[keep], value[keep], len(latent)) for value in values]
        divisor = sums[1] if len(sums) == 2 else count
        known = divisor > 0  # else no token is left, or the placebo has no effect
        r = _correlation(score[latent][known], sums[0][known] / divisor[known], weight[known])
        return np.nan if r is None else r

    return jackknife(statistic, len(rows), rows["prompt"].to_numpy(), correct_pairs=False)


def _correlation(x: ndarray, y: ndarray, weight: ndarray | None = None, rank: bool = True) -> float | None:
    """None where one of the two is constant or not known. Only ranks are weighted."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or any(np.ptp(v) <= 1e-5 * np.abs(v).max() for v in (x, y)):
        return None
    if rank:
        return weighted_spearman(x, y, None if weight is None else weight[known])
    return float(np.corrcoef(x, y)[0, 1])


def said(value: Any) -> str:
    """An estimate in its JSON form, or a number, as text."""
    if value is None:
        return MISSING
    if not isinstance(value, dict):
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    if value["value"] is None:
        return MISSING
    kind = value.get("kind")
    if kind in ("everything", "exclusive", "none"):
        return f"{value['value']:.3g} (not identified)"
    ends = "" if value["low"] is None else f" [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value['value']:.3g}{ends}"


def quartiles_said(line: Mapping[str, Any], kind: str) -> str:
    """Shares of firing by quartile: 4/5/5/86."""
    values = [line[f"{kind}_q{q}"]["value"] for q in range(1, 5)]
    return MISSING if any(v is None for v in values) else "/".join(f"{100 * v:.0f}" for v in values)


GRADIENTS = (
    "Gradient: of ‖x - x̂‖² by w_i. Error: 2|<x - x̂, d_i>|, its factor that has no norm in it; a row read as <w_i, x_c> multiplies it by "
    "‖x_c‖, a cosine by about ‖x_c‖^a. To compare scores, read error, or error·‖x_c‖, for both."
)


def matching(p: Mapping[str, Any]) -> list[str]:
    """What the columns of the tables mean at this run's thresholds; a line each."""
    return [
        f"rare: active on fewer than {p['min_active']} tokens, not matched. Matched: correlation >= {p['correlation']:g}, cosine > "
        f"{p['cosine']:g}, one to one; shared: agrees only with latents matched to others.",
        GRADIENTS,
    ]


def tables(lines: Mapping[str, list[dict[str, Any]]]) -> dict[str, pd.DataFrame]:
    """SAEs, pairs of them, seeds, alignment against MCS and effect, discovery."""
    saes = [
        {
            "sae": s["sae"], "latents": s["latents"], "silent": s["silent"], "rare": s["rare"], "L0": said(s["l0"]),
            "near-duplicates": s["near_duplicates"], "firing by quartile %": quartiles_said(s, "share"),
            "gradient Q4/Q1 > 2": said(s.get("gradient_above_2")), "median": said(s.get("gradient_median")),
            "error > 2": said(s.get("error_above_2")), "error·‖x_c‖ > 2": said(s.get("error_norm_above_2")),
            "latents with it": s.get("gradient_latents", 0),
        }
        for s in lines["saes"]
    ]  # fmt: skip
    pairs = [
        {
            "sae": s["sae"], "other": s["other"], "one seed": {True: "yes", False: "no", None: "?"}[s["same_seed"]], "matched": f"{s['matched']} ({s['matched_share']:.1%})",
            "chance": f"{s['matched_share_null']:.1%}", "shared": s["shared"], "unique": s["unique"],
            "matched fire in Q1-4 %": quartiles_said(s, "matched"),
            "unique fire in Q1-4 %": quartiles_said(s, "unique"), "MCS": said(s["mcs"]),
            "chance MCS": said(s["mcs_null_covariance"]), "stable": said(s["stable_share"]),
        }
        for s in lines["pairs"]
    ]  # fmt: skip
    found = {"SAEs": pd.DataFrame(saes), "Pairs": pd.DataFrame(pairs)}
    if lines["seeds"]:
        seeds = [
            {k: said(v) for k, v in s.items() if not k.endswith("_points") and k != "saes"} for s in lines["seeds"]
        ]
        found["Over training seeds, means of pairs"] = pd.DataFrame(seeds)
    aligned = pd.DataFrame([{k: said(v) for k, v in s.items()} for s in lines["alignment"]])
    found["Alignment against MCS and effect"] = aligned
    if lines["discovery"]:
        known = [{k: said(v) for k, v in s.items()} for s in lines["discovery"]]
        gaps = pd.DataFrame(known).fillna(MISSING)  # a pair that could not be probed says why and nothing else
        found["Probing gap (other - sae), discovery and separability"] = gaps
    return found


def columns_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of JSON's estimates as columns: `x`, `x_low`, `x_high` (see `tables.with_ends`)."""
    found: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            found[name] = value
    return found
