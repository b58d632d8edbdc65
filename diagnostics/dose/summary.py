"""Statistics of edits of equal length, for each layer, context and dose, and tables of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from diagnostics import statistics
from diagnostics.results.headlines import Group, Headline, middle, null_range
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.tables import PLACEBOS, few_prompts, with_ends

RATIOS = (
    ("toward_token", "between_tokens"),
    ("toward_token", "isotropic"),
    ("between_tokens", "isotropic"),
    ("norm_up", "isotropic"),
    ("norm_down", "isotropic"),
    ("norm_up", "between_tokens"),
    ("norm_down", "between_tokens"),
)
_PLACE = ["model", "layer", "point", "context"]
_SHOWN_DOSE = 0.2
SHORT_COLUMNS = ("layer", "dose", "tokens")
"""Of `short_frame`, beside a column for each edit, its underscores as spaces."""


def shown_dose(doses: Sequence[float]) -> float:
    """Of some doses the one that figures by depth show: 0.2, or what is nearest to it by ratio."""
    return min(doses, key=lambda dose: abs(np.log(dose / _SHOWN_DOSE)))


def placebo_names(direction: str) -> list[str]:
    """What the edits are called that a given direction is compared with."""
    return [f"{direction}_{kind}" for kind in PLACEBOS]


def summaries(frame: pd.DataFrame, directions: list[str]) -> list[dict[str, Any]]:
    """Of each model × layer × point × context × dose, with 95 % intervals over prompts.

    Of each edit: KL (median; mean without an interval, its error at this noise floor), JS, share of top-1 changes, median of direct effect
    over total. Ratios of the KLs of two edits of the same token at the same dose, `RATIOS` and each given direction over its placebos:
    medians over tokens, and ratios of means without an interval.
    """
    found = []
    floors = frame[frame.edit == "self"].groupby(_PLACE)["kl"].agg(statistics.noise_floor)
    ratios = [*RATIOS, *((name, placebo) for name in directions for placebo in placebo_names(name))]
    with few_prompts():  # few prompts: their number stands beside each interval
        for key, rows in frame[frame.edit != "self"].groupby([*_PLACE, "dose"], sort=False):
            key = cast(tuple[Any, ...], key)
            floor = float(floors.get(key[:4], 0.0))
            name = dict(zip([*_PLACE, "dose"], key, strict=True)) | {"noise_floor": floor}
            name["dose"] = round(float(name["dose"]), 6)
            found.append(name | _group(cast(pd.DataFrame, rows), floor, ratios))
    return found


def _clusters(rows: pd.DataFrame) -> np.ndarray:
    return rows[["target_prompt", "source_prompt"]].to_numpy().astype(int)


def _group(rows: pd.DataFrame, floor: float, ratios: list[tuple[str, str]]) -> dict[str, Any]:
    edits = {}
    for edit, some in rows.groupby("edit", sort=False):
        own, kl = _clusters(some), some.kl.to_numpy(float)
        edits[edit] = {
            "n": len(some),
            "mean_kl": statistics.mean_alone(kl, own),
            "error_of_mean_kl": statistics.error_of(max(float(kl.mean()), 0.0), floor),
            "median_kl": statistics.median(kl, own),
            "mean_js": statistics.mean(some.js.to_numpy(float), own),
            "top1_changed": statistics.share(some.top1_changed.to_numpy(bool), own),
            "direct_over_total": statistics.median_ratio(some.kl_direct.to_numpy(float), kl, floor, own),
        }
    kl = rows.pivot(index="pair", columns="edit", values="kl").astype(float)
    own = _clusters(rows.drop_duplicates("pair").set_index("pair").loc[kl.index])
    found: dict[str, Any] = {"n_tokens": len(kl), "n_prompts": len(np.unique(own)), "edits": edits}
    found |= {"ratios": {}, "ratios_of_means": {}}
    for top, bottom in ratios:
        if top in kl and bottom in kl:
            both = (kl[top].notna() & kl[bottom].notna()).to_numpy()
            a, b = kl[top].to_numpy()[both], kl[bottom].to_numpy()[both]
            found["ratios"][f"{top} ÷ {bottom}"] = statistics.median_ratio(a, b, floor, own[both])
            found["ratios_of_means"][f"{top} ÷ {bottom}"] = statistics.ratio_of_means(a, b, floor, own[both])
    return found


def summary_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each model, layer, point, context, dose and edit, estimates with the ends of their intervals."""
    rows = []
    for group in groups:
        for edit, values in group["edits"].items():
            row = {key: group[key] for key in (*_PLACE, "dose", "noise_floor")} | {"edit": edit, "n": values["n"]}
            for name, value in values.items():
                if isinstance(value, Estimate):
                    row[name] = value
            for kind, ratios in (("", group["ratios"]), (", of means", group["ratios_of_means"])):
                for name, value in ratios.items():
                    if name.startswith(f"{edit} ÷ "):
                        row[name.removeprefix(edit).lstrip() + kind] = value
            rows.append(with_ends(row))
    return pd.DataFrame(rows)


def short_frame(groups: list[dict[str, Any]], nulls: list[list[dict[str, Any]]], directions: list[str]) -> pd.DataFrame:
    """A line for each layer and dose, for a terminal; `NOTE` explains the columns."""
    rows, placebos = [], {name for direction in directions for name in placebo_names(direction)}
    for g in groups:
        kl = {edit: values["median_kl"] for edit, values in g["edits"].items()}
        row: dict[str, Any] = {"layer": g["layer"], "dose": f"{g['dose']:g}", "tokens": g["n_tokens"]}
        for top, bottom in (
            ("toward_token", "between_tokens"),
            ("norm_up", "isotropic"),
            *((d, placebo_names(d)[0]) for d in directions),
        ):
            ratio = g["ratios"].get(f"{top} ÷ {bottom}")
            if ratio is not None:
                label = f"{top}÷{'its placebo' if bottom in placebos else bottom}".replace("_", " ")
                row[label] = ratio
                same = [n for some in nulls for n in some if (n["layer"], n["dose"]) == (g["layer"], g["dose"])]
                if same:
                    ends = sorted(n["ratios"][f"{top} ÷ {bottom}"].value for n in same)
                    row["untrained" + " " * len([c for c in row if c.startswith("untrained")])] = (
                        f"{ends[0]:.3g} … {ends[-1]:.3g}"
                    )
        row |= {edit.replace("_", " "): f"{kl[edit].value:.3g}" for edit in kl if edit not in placebos}
        rows.append(row)
    return pd.DataFrame(rows)


def first_numbers(groups: Sequence[Group], nulls: Sequence[Group], provenance: Mapping[str, Any]) -> Iterator[Headline]:
    """Ratios at equal dose at the middle block, beside those of randomly initialised models."""
    dose = shown_dose(provenance["doses"])
    given = [f"{name} ÷ {name}_placebo_token" for name in provenance["directions"]]
    for g in middle([g for g in groups if g["dose"] == dose]):
        same = [n for n in nulls if (n["layer"], n["dose"]) == (g["layer"], dose)]
        for ratio in [*given, "toward_token ÷ between_tokens", "norm_up ÷ isotropic"]:
            if ratio in g["ratios"]:
                against = null_range([n["ratios"][ratio] for n in same if ratio in n["ratios"]], g["ratios"][ratio])
                words = f"median ratio of KLs, {ratio.replace('_', ' ')} at dose {dose:g}, block {g['layer']}"
                yield Headline(
                    words,
                    str(g["ratios"][ratio]),
                    f"1: no more ({statistics.verdict(g['ratios'][ratio], 1)}); {against}".strip("; "),
                )


NOTE = (
    "Median KL in nats of edits that move x by dose·‖x‖; ratios of KLs at equal dose: medians over tokens with 95 % intervals "
    "over prompts; untrained: the range\nover networks of the same shape with random weights."
)
