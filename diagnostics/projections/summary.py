"""Statistics of projection ablations: effects of each edit, and which score predicts them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import pandas as pd

from diagnostics import statistics
from diagnostics.projections.norm_exponent import (
    TOKEN,
    BesidePlacebo,
    Exponent,
    Interventional,
    Observational,
    interventional,
    observational,
)
from diagnostics.results.headlines import Headline
from diagnostics.statistics.tables import PLACEBOS, few_prompts, with_ends

PLACE = ["model", "layer", "point", "context", "sae"]


def summaries(frame: pd.DataFrame, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each model × layer × point × context × SAE, with 95 % intervals over prompts, the latents held fixed.

    `edits`: median and mean KL, error at this noise floor, mean dose ‖Δx‖ and ‖Δx‖/‖x‖, direct over total effect; every (latent, token) counts
    for as many as it stands for. `ratios`: medians of the main edit's KL to its placebos', on all tokens and on those where the latent
    fires. `exponents`: see `exponents`. `learned_a`: of a cosine-scored SAE, mean and spread over its latents.
    """
    found = []
    with few_prompts():  # few prompts: their number stands beside each interval
        for key, rows in frame.groupby(PLACE, sort=False):
            rows = cast(pd.DataFrame, rows)
            group = dict(zip(PLACE, cast(tuple[Any, ...], key), strict=True))
            floor = noise_floor(frame, group)
            effects = _effects(rows, floor, provenance["reference"])
            known = provenance["saes"][group["sae"]]["learned_a"]
            found.append(
                group
                | {
                    "main": provenance["reference"],
                    "noise_floor": floor,
                    **effects,
                    "exponents": exponents(rows, floor, provenance["reference"]),
                }
                | {"learned_a": known}
            )
    return found


def noise_floor(frame: pd.DataFrame, group: dict[str, Any]) -> float:
    """Of a group's self rows, or of those of its model and context where it has none; 0 without any."""
    for keys in (PLACE, ["model", "context"]):
        own = frame.loc[np.logical_and.reduce([frame[key] == group[key] for key in keys]) & (frame.edit == "self")]
        if len(own):
            return statistics.noise_floor(own.kl.to_numpy(float))
    return 0.0


def exponents(rows: pd.DataFrame, floor: float, reference: str = "zero") -> dict[str, Exponent]:
    """The norm exponent of one group's rows, read in several ways.

    `observational`: of the main edit, by cos(x, d̂) and ‖x‖; `centred`: by cos(x_c, d̂) and ‖x_c‖; `encoder`: by cos(x_c, w) and ‖x_c‖;
    `placebo_token`, `placebo_isotropic`: of the placebos, what doses alone give; `rotate`, `rotate_placebo_token`: at a fixed dose,
    where β_c is what the cosine says beyond dose; `interventional`, which holds its own placebos'. What has no rows is left out.
    """
    by = {str(edit): some for edit, some in rows.groupby("edit", sort=False)}
    ways: dict[str, Callable[[], Exponent]] = {}
    if reference in by:
        main = by[reference]
        ways["observational"] = lambda: observational(main, floor)
        ways["centred"] = lambda: observational(main, floor, centred=True, covariates=False)
        if main.cosine_encoder_centred.notna().any():
            ways["encoder"] = lambda: observational(main, floor, centred=True, encoder=True, covariates=False)
    for edit in (*PLACEBOS, "rotate", *(f"rotate_{p}" for p in PLACEBOS)):
        if edit in by:
            ways[edit] = lambda edit=edit: observational(by[edit], floor, covariates=False)
    if "scaled" in by and "half" in by and "zero" in by:
        ways["interventional"] = lambda: interventional(rows, floor, reference)
    return {name: way() for name, way in ways.items()}


def _effects(rows: pd.DataFrame, floor: float, main: str) -> dict[str, Any]:
    rows = rows.assign(weight=rows.latent_weight.to_numpy(float) * rows.token_weight.to_numpy(float))
    edits = {}
    for edit, some in rows.groupby("edit", sort=False):
        own, w, kl = some.target_prompt.to_numpy(int), some.weight.to_numpy(), some.kl.to_numpy(float)
        mean_kl = statistics.ratio_of_means(w * kl, w, 0.0, own)
        edits[str(edit)] = {
            "n": len(some),
            "median_kl": statistics.median(kl, own, weight=w),
            "mean_kl": mean_kl,
            "error_of_mean_kl": statistics.error_of(max(mean_kl.value, 0.0), floor),
            "mean_dose": float((w * some.delta_norm).sum() / w.sum()),
            "mean_relative_dose": float((w * some.delta_norm / some["norm"]).sum() / w.sum()),
        }
        if "kl_direct" in some:
            direct = some.kl_direct.to_numpy(float)
            edits[str(edit)]["direct_over_total"] = statistics.median_ratio(direct, kl, floor, own, weight=w)
    kl = rows[rows.edit.isin([main, *PLACEBOS])].pivot(index=TOKEN, columns="edit", values="kl").astype(float)
    of_main = rows[rows.edit == main].set_index(TOKEN)
    found: dict[str, Any] = {
        "n_latents": rows.latent.nunique(),
        "n_pairs": len(of_main),
        "n_prompts": rows.target_prompt.nunique(),
        "edits": edits,
        "ratios": {},
        "ratios_of_means": {},
    }
    w, z = (of_main[name].reindex(kl.index).to_numpy(float) for name in ("weight", "activation"))
    own = kl.index.get_level_values("target_prompt").to_numpy(int)
    for placebo in PLACEBOS:
        if main not in kl or placebo not in kl:
            continue
        both = (kl[main].notna() & kl[placebo].notna()).to_numpy()
        for end, some in (("", both), (", where it fires", both & (np.nan_to_num(z) != 0))):
            if some.any():
                top, bottom = (kl[edit].to_numpy()[some] for edit in (main, placebo))
                name = f"{main} ÷ {placebo}{end}"
                found["ratios"][name] = statistics.median_ratio(top, bottom, floor, own[some], weight=w[some])
                of_means = statistics.ratio_of_means(w[some] * top, w[some] * bottom, floor * w[some].mean(), own[some])
                found["ratios_of_means"][name] = of_means
    return found


def summary_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each model, layer, point, context and SAE, estimates with the ends of their intervals."""
    rows = []
    for g in groups:
        row = {key: g[key] for key in (*PLACE, "noise_floor", "n_latents", "n_pairs", "n_prompts")}
        for edit, values in g["edits"].items():
            row |= {f"n {edit}": values["n"], f"KL {edit}": values["median_kl"], f"mean KL {edit}": values["mean_kl"]}
            row[f"relative dose {edit}"] = values["mean_relative_dose"]
        row |= g["ratios"] | {f"{name}, of means": value for name, value in g["ratios_of_means"].items()}
        for name, way in g["exponents"].items():
            row |= {f"a {name}": way.a, f"a {name} p cosine": way.p_cosine, f"a {name} p inner": way.p_inner}
            for placebo, beside in way.placebos.items() if isinstance(way, Interventional) else ():
                row |= {f"a {name} {placebo}": beside.placebo, f"a {name} less {placebo}": beside.difference}
        row["a learned"] = np.nan if g["learned_a"] is None else g["learned_a"]["mean"]
        rows.append(with_ends(row))
    return pd.DataFrame(rows)


def short_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each group, for a terminal; `NOTE` explains the columns."""
    rows = []
    for g in groups:
        main = g["main"]
        row: dict[str, Any] = {"model": g["model"], "context": g["context"].replace("_", "-"), "block": g["layer"]}
        row["SAE"] = g["sae"]
        for name, value in g["ratios"].items():
            if "isotropic" not in name:
                row["÷ placebo" + name.partition(",")[1] + name.partition(",")[2]] = value
        row |= {f"KL {main}": g["edits"][main]["median_kl"], "dose": f"{g['edits'][main]['mean_relative_dose']:.2g}"}
        row |= {"latents": g["n_latents"], "pairs": g["n_pairs"]}
        ways = g["exponents"]
        for name in ("observational", "placebo_token", "interventional"):
            if name in ways:
                row[f"a {name.replace('_token', '')}"] = ways[name].a
        if beside := beside_placebo(g):
            row |= {"its placebo's a": beside.placebo, "a less placebo's": beside.difference}
        if beside := beside_placebo(g, "placebo_isotropic"):
            row["less isotropic's"] = beside.difference
        if "rotate" in ways:
            row["β_c at fixed dose"] = cast(Observational, ways["rotate"]).beta_cosine
        if "rotate_placebo_token" in ways:
            row["its placebo's β_c"] = cast(Observational, ways["rotate_placebo_token"]).beta_cosine
        row["a learned"] = np.nan if g["learned_a"] is None else g["learned_a"]["mean"]
        rows.append(row)
    return pd.DataFrame(rows)


def beside_placebo(group: Mapping[str, Any], placebo: str = "placebo_token") -> BesidePlacebo | None:
    """The rescaled exponent beside a placebo's; None where that was not measured."""
    way = group["exponents"].get("interventional")
    return None if way is None else way.placebos.get(placebo)


def within_floors(groups: list[dict[str, Any]]) -> list[str]:
    """Of each group the share of rows within 10 noise floors, where there are any; a line each."""
    lines = []
    for g in groups:
        way = g["exponents"].get("observational")
        if way is not None and way.n_below_floor:
            where = f"{g['model']}, {g['context'].replace('_', '-')}, {g['sae']}"
            lines.append(
                f"{where}: {way.share_below_floor:.1%} of {way.n_rows + way.n_below_floor} rows within 10 noise floors"
            )
    return lines


def first_numbers(groups: list[dict[str, Any]]) -> Iterator[Headline]:
    """The main edit's KL over its placebo's; the exponent of rescaled activations less the placebo's."""
    for g in groups:
        ratio = g["ratios"].get(f"{g['main']} ÷ placebo_token")
        if ratio is not None:
            words = f"KL of removing a direction ÷ placebo, {g['sae']}, block {g['layer']}"
            yield Headline(words, str(ratio), "1: no more than a random edit of the same norm and angle")
        if beside := beside_placebo(g):
            words = f"norm exponent a of rescaled activations, latents less placebos, {g['sae']}, block {g['layer']}"
            against = f"0: a is the site's, not the latents'; latents {beside.latent}, placebos {beside.placebo}"
            if other := beside_placebo(g, "placebo_isotropic"):
                against += f", less isotropic placebos {other.difference}"
            yield Headline(words, str(beside.difference), against)


NOTE = (
    "Median KL in nats, every latent and token counted for as many as it stands for; dose: mean ||dx||/||x||; ÷ "
    "placebo: median ratio to the KL of an edit of the\n"
    "same norm and angle along the difference of two other tokens; a: norm exponent, 0 where effect goes with "
    "the cosine, 1 where it goes with the inner\n"
    "product; interventional: the same token's activation rescaled, beside the same of placebos of equal dose, "
    "less these at the same tokens: where that is\n"
    "0, a is a property of the site. β_c at fixed dose: slope of log KL on log|cos| of a rotation by a fixed "
    "angle away from the direction. Brackets: 95 %\n"
    "intervals over prompts, the latents held fixed (a: Fieller)."
)
