"""Statistics of an evaluation of SAEs: reconstruction, alignment and dead latents, by quartile of the norm."""

from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.statistics.estimate import Estimate, digits

UNIFORM = 5 / 9
"""The bimodality coefficient of a uniform distribution; larger values indicate two modes or a heavy skew."""
_KEYS = ("sae", "site", "corpus", "tokens")
ENDS = ("low", "high", "se")
_SCORES = {"kl_score": "KL score", "ce_score": "CE score", "kl": "KL"}


def as_group(row: dict[str, Any]) -> dict[str, Any]:
    columns = {f"{name}_{end}" for name in MEASURES for end in ENDS}
    group = {k: v for k, v in row.items() if k not in MEASURES and k not in columns}
    for name in MEASURES:
        of = {"kl": "kl_", "ce": "ce_"}.get(name[:2], "")
        counts = row[f"n_{of}tokens"], row[f"n_{of}prompts"]
        low, high, se = (row[f"{name}_{end}"] for end in ENDS)
        effective = row.get(f"n_{of}effective", np.nan)
        group[name] = Estimate(row[name], low, high, se, *counts, n_effective=effective)
    return group


def overall_table(group: dict[str, Any]) -> dict[str, Any]:
    line = {name: group[name] for name in _KEYS} | {"FVE": group["fve"], "L0": group["l0"]}
    line["dead"] = f"{group['dead_share']:.1%} of {group['d_sae']} on {group['n_tokens']}"
    line |= {label: group[name] for name, label in _SCORES.items()}
    return line | {"cos": group["cosine"], "‖x̂‖/‖x‖": group["norm_ratio"], "MSE": group["mse"]}


def quartile_table(groups: list[dict[str, Any]]) -> dict[str, Any]:
    line = {"sae": groups[0]["sae"], "corpus": groups[0]["corpus"]}
    for measure, label in (("fve", "FVE"), ("kl_score", "KL score"), ("norm_ratio", "‖x̂‖/‖x‖")):
        line |= {f"{label} {g['quartile']}": g[measure].value for g in groups[1:]}
    return line


def matched_table(line: dict[str, Any]) -> dict[str, Any]:
    """A comparison at equal L0 or FVE."""
    axis = {"l0": "L0", "fve": "FVE"}[line["axis"]]
    found = {
        "family − reference": f"{line['family']} − {line['reference']}",
        "site": line["site"],
        "corpus": line["corpus"],
    }
    found["at equal"] = f"{axis} {digits(line['value'])}"
    labels = {"fve": "FVE", "l0": "L0", **_SCORES, "dead_share": "never fires"}
    found |= {label: "" if name == line["axis"] or line["note"] else line[name] for name, label in labels.items()}
    return found | {"note": line["note"], "common range": f"{digits(line['low'])} to {digits(line['high'])}"}


def shift_table(line: dict[str, Any]) -> dict[str, Any]:
    """A difference between texts."""
    found = {"sae": line["sae"]} | ({"minus": line["against"]} if line["against"] else {})
    found |= {"site": line["site"], "texts": f"{line['second']} − {line['first']}"}
    return found | {
        label: line[name] for name, label in {"fve": "FVE", "l0": "L0", **_SCORES, "silent": "silent"}.items()
    }


def bimodality(x: Float[ndarray, "value"]) -> float:
    """Sarle's bimodality coefficient with the correction for finite samples: 5/9 for a uniform, 1/3 for a normal distribution.

        (g² + 1) / (k + 3(n − 1)²/((n − 2)(n − 3))),      g, k: sample skewness and excess kurtosis, unbiased

    nan for fewer than 4 values and for constant values. A heavy skew raises it too, so look at the histogram.
    Source: SAS/STAT user's guide 1990; Pfister et al. 2013.
    """
    n = len(x)
    if n < 4 or np.std(x) <= 1e-5 * np.abs(x).max():
        return float("nan")
    skew, kurtosis = stats.skew(x, bias=False), stats.kurtosis(x, bias=False)
    return float((skew**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def live(latents: pd.DataFrame) -> pd.DataFrame:
    """One line for each latent that fired on any corpus."""
    return latents.loc[fired(latents)].drop_duplicates(["sae", "latent"])


def fired(latents: pd.DataFrame) -> pd.Series:
    """Whether each line's latent fired on any corpus."""
    return cast(pd.Series, latents.groupby(["sae", "latent"], sort=False)["fired"].transform("any"))


def alignment_of(name: Any, rows: pd.DataFrame) -> dict[str, Any]:
    some, every = live(rows), rows.drop_duplicates("latent")
    line: dict[str, Any] = {"sae": name, "latents": len(every), "live": len(some)}
    for column in ("alignment", "cosine"):
        x = some[column].to_numpy(float)
        line |= {column: _mean(x), f"{column} sd": _mean((x - _mean(x)) ** 2) ** 0.5, f"{column} < 0.5": _mean(x < 0.5)}
        line[f"{column} bimodality"] = bimodality(x)
    line["bimodality with the dead"] = bimodality(every.alignment.to_numpy(float))
    a = some.exponent.dropna().to_numpy(float)
    return line | {"exponent": _mean(a), "exponent sd": _mean((a - _mean(a)) ** 2) ** 0.5}


def _mean(x: ndarray) -> float:
    return float(x.mean()) if len(x) else float("nan")
