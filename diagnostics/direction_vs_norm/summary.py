"""Statistics of direction and norm patches, for each layer and context, and tables of them."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from diagnostics import statistics
from diagnostics.results.headlines import Group, Headline, middle, null_range
from diagnostics.statistics.estimate import CensoredMedian, Estimate
from diagnostics.statistics.tables import few_prompts, with_ends

SCALES = (0.5, 2.0, 5.0)
RATIOS = (
    ("direction", "norm"),
    ("direction", "placebo_direction"),
    ("direction", "placebo_token"),
    ("norm", "placebo_norm"),
    ("direction", "full"),
    ("norm", "full"),
    *(("random_direction", f"scale_{s:g}") for s in SCALES),
    ("rotate_like_0.5", "scale_0.5"),
    ("rotate_like_2", "scale_2"),
)


def summaries(frame: pd.DataFrame, log_vocab: float) -> list[dict[str, Any]]:
    """`group_statistics` of each model × layer × point × context × pair set of a direction-norm table, with its keys."""
    place = ["model", "layer", "point", "context"]
    floors = frame[frame.edit == "self"].groupby(place)["kl"].agg(statistics.noise_floor)
    found = []
    with few_prompts():  # few prompts: their number stands beside each interval
        for key, rows in frame.groupby([*place, "pair_set"], sort=False):
            key = cast(tuple[Any, ...], key)
            name = dict(zip([*place, "pair_set"], key, strict=True))
            found.append({**name, **group_statistics(rows, float(floors.get(key[:4], 0.0)), log_vocab)})
    return found


def group_statistics(rows: pd.DataFrame, floor: float, log_vocab: float) -> dict[str, Any]:
    """Of the rows of one layer, context and pair set, with 95 % intervals over prompts.

    Of each edit: KL (median; mean without an interval, its error at this noise floor), median of direct effect over total, JS, share of
    top-1 changes, dose ‖Δx‖/‖x‖. Ratios of `RATIOS` between the KLs of two edits of a pair: the median over pairs, and of means without an
    interval, a denominator at or below the noise floor (nats) making it a lower bound. `n_saturated`: rows whose KL exceeds log_vocab.
    """
    kl = rows.pivot(index="pair", columns="edit", values="kl").astype(float)
    pairs = rows.drop_duplicates("pair").set_index("pair").loc[kl.index]
    clusters = pairs[["target_prompt", "source_prompt"]].to_numpy().astype(int)
    edits = {}
    for edit, some in rows.groupby("edit", sort=False):
        own = some[["target_prompt", "source_prompt"]].to_numpy().astype(int)
        values = some.kl.to_numpy(float)
        edits[edit] = {
            "n": len(some),
            "mean_kl": statistics.mean_alone(values, own),
            "median_kl": statistics.median(values, own),
            "direct_over_total": statistics.median_ratio(some.kl_direct.to_numpy(float), values, floor, own),
            "mean_js": statistics.mean(some.js.to_numpy(float), own),
            "top1_changed": statistics.share(some.top1_changed.to_numpy(bool), own),
            "mean_dose": statistics.mean((some.delta_norm / some.target_norm).to_numpy(float), own),
            "error_of_mean_kl": statistics.error_of(max(float(values.mean()), 0.0), floor),
        }
    found: dict[str, Any] = {
        "n_pairs": len(kl),
        "n_prompts": len(np.unique(clusters[clusters >= 0])),
        "noise_floor": floor,
        "n_saturated": int((rows.kl > log_vocab).sum()),
        "edits": edits,
        "ratios": {},
        "correlations": {},
    }
    for top, bottom in RATIOS:
        if top in kl and bottom in kl:
            both = (kl[top].notna() & kl[bottom].notna()).to_numpy()
            a, b, own = kl[top].to_numpy()[both], kl[bottom].to_numpy()[both], clusters[both]
            found["ratios"][f"{top} ÷ {bottom}"] = {
                "of_means": statistics.ratio_of_means(a, b, floor, own),
                "median": statistics.censored_median(a, b, floor, own),
            }
    if "direction" in kl:
        both = (kl.direction.notna() & kl.norm.notna()).to_numpy()
        kl, pairs, clusters = kl[both], pairs[both], clusters[both]
        found["share_direction_above_norm"] = statistics.share((kl.direction > kl.norm).to_numpy(), clusters)
        distance = (1 - pairs.cosine).to_numpy(float)
        growth = np.abs(np.log(pairs.source_norm / pairs.target_norm)).to_numpy(float)
        for kind in ("pearson", "spearman"):
            found["correlations"][f"1 − cos, KL of direction ({kind})"] = statistics.correlation(
                distance, kl.direction.to_numpy(), clusters, kind
            )
            found["correlations"][f"|log norm ratio|, KL of norm ({kind})"] = statistics.correlation(
                growth, kl.norm.to_numpy(), clusters, kind
            )
    return found


def _short(value: Estimate | CensoredMedian) -> str:
    """Three digits. Above 10⁶ a ratio says only that its denominator is rounding error."""
    estimate = value.estimate if isinstance(value, CensoredMedian) else value
    if np.isnan(estimate.value):  # no ratio: numerator and denominator lie within the floor in every row
        return ""
    bound = estimate.bound or estimate.value > 1e6
    return f"≥ {min(estimate.value, 1e6):.3g}" if bound else f"{estimate.value:.3g}"


def summary_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a group: median and mean KL (nats) and dose of each edit, ratios, each with the ends of its interval."""
    rows = []
    for group in groups:
        row = {key: group[key] for key in ("model", "layer", "point", "context")}
        row |= {"pairs": group["n_pairs"], "prompts": group["n_prompts"]}
        for edit, values in group["edits"].items():
            row[f"kl_{edit}"], row[f"mean_kl_{edit}"] = values["median_kl"], values["mean_kl"]
            row[f"dose_{edit}"] = values["mean_dose"].value
            if edit != "self":
                row[f"direct ÷ total {edit}"] = values["direct_over_total"]
        if "share_direction_above_norm" in group:
            row["direction_above_norm"] = group["share_direction_above_norm"].value
        for name, ratio in group["ratios"].items():
            row[f"median {name}"], row[f"mean {name}"] = ratio["median"], ratio["of_means"]
        row["noise_floor"] = group["noise_floor"]
        rows.append(with_ends(row))
    return pd.DataFrame(rows)


def short_frame(groups: list[dict[str, Any]], nulls: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """A line for each group of one pair set, the range over randomly initialised models last; `NOTE` explains the columns."""
    rows = []
    for g in groups:
        edits, ratios = g["edits"], g["ratios"]
        row = {
            "layer": g["layer"],
            "context": g["context"].replace("_", "-"),
            "pairs": g["n_pairs"],
            "dir÷token placebo": ratios["direction ÷ placebo_token"]["median"].estimate,
            "dir÷isotropic": _short(ratios["direction ÷ placebo_direction"]["median"]),
            "median dir÷norm": _short(ratios["direction ÷ norm"]["median"]),
            "dir>norm": f"{g['share_direction_above_norm'].value:.1%}",
            "KL direction": _short(edits["direction"]["median_kl"]),
            "KL norm": _short(edits["norm"]["median_kl"]),
            "dose dir.": _short(edits["direction"]["mean_dose"]),
            "dose norm": _short(edits["norm"]["mean_dose"]),
            "prompts": g["n_prompts"],
            "eff. prompts": f"{edits['direction']['median_kl'].n_effective:.3g}",
            "direct÷total norm": _short(edits["norm"]["direct_over_total"]),
            "noise floor": f"{g['noise_floor']:.1e}",
        }
        same = [n for some in nulls.values() for n in some if (n["layer"], n["context"]) == (g["layer"], g["context"])]
        if same:
            row["untrained: dir÷norm"] = _range([n["ratios"]["direction ÷ norm"]["median"] for n in same])
            row["dir÷token"] = _range([n["ratios"]["direction ÷ placebo_token"]["median"] for n in same])
        rows.append(row)
    return pd.DataFrame(rows)


def _range(values: list[Any]) -> str:
    """From the smallest to the largest over randomly initialised models; few seeds give no interval."""
    estimates = sorted((v.estimate if isinstance(v, CensoredMedian) else v for v in values), key=lambda e: e.value)
    ends = list(dict.fromkeys([_short(estimates[0]), _short(estimates[-1])]))
    return " … ".join(ends)


def first_numbers(groups: Sequence[Group], nulls: Sequence[Group]) -> Iterator[Headline]:
    """Ratios of the patches at the middle block, beside those of randomly initialised models."""
    for g in middle(groups):
        same = [n for n in nulls if (n["layer"], n["context"]) == (g["layer"], g["context"])]
        for ratio, words in (
            ("direction ÷ placebo_token", "direction patch ÷ random edit of its norm and angle"),
            ("direction ÷ norm", "direction patch ÷ norm patch, at unequal doses"),
            ("norm ÷ placebo_norm", "norm patch ÷ rotation by its distance"),
        ):
            if ratio in g["ratios"]:
                value = g["ratios"][ratio]["median"].estimate
                against = null_range([n["ratios"][ratio]["median"] for n in same if ratio in n["ratios"]], value)
                one = (
                    ""
                    if ratio == "direction ÷ norm"
                    else f"1: no more than its placebo ({statistics.verdict(value, 1)}); "
                )
                yield Headline(f"{words} (median of KLs), block {g['layer']}", str(value), (one + against).strip("; "))


NOTE = (
    "KL in nats, medians over pairs; dose = mean ‖Δx‖/‖x‖; ratios: medians over pairs; ÷ placebo: direction patch over a "
    "random edit of the same norm and angle\n(isotropic tangent; tangent between two other tokens, with its 95 % interval "
    "over prompts); ≥: the denominator lies within the noise floor."
)
