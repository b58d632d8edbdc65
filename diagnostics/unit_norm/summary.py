"""Statistics of the unit-norm experiment: median KL of each edit by layer, and ratios to the rotation."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import statistics
from diagnostics.results.headlines import Group, Headline, middle, null_range
from diagnostics.unit_norm.design import ALONE, TOGETHER


def first_numbers(groups: Sequence[Group], nulls: Sequence[Group]) -> Iterator[Headline]:
    for g in middle(groups):
        for name in (name for name in g if " ÷ " in name and "mean" not in name):
            known = null_range([n[name] for n in nulls if n["layer"] == g["layer"]], g[name])
            against = f"1: no more than turning as far ({statistics.verdict(g[name], 1)}); {known}".strip("; ")
            yield Headline(f"median ratio of KLs, {name.replace('_', ' ')}, block {g['layer']}", str(g[name]), against)


def group_statistics(key: Any, rows: pd.DataFrame) -> dict[str, Any]:
    floor = statistics.noise_floor(rows.kl[rows.edit == "self"].to_numpy(float))
    kl = rows.pivot(index="token", columns="edit", values="kl").astype(float)
    own = rows.drop_duplicates("token").set_index("token").loc[kl.index, "target_prompt"].to_numpy(int)
    group: dict[str, Any] = {"model": key[0], "layer": int(key[1]), "n_tokens": len(kl), "noise_floor": floor}
    group["mean_dose"] = float((rows.delta_norm / rows.target_norm)[rows.edit == "unit_norm"].mean())
    for edit in (*ALONE[1:], *TOGETHER):
        there = kl.get(edit, pd.Series(np.nan, kl.index)).notna().to_numpy()
        values = kl[edit].to_numpy()[there] if there.any() else np.zeros(0)
        group[edit], group[f"mean {edit}"] = (
            statistics.median(values, own[there]),
            statistics.mean_alone(values, own[there]),
        )
    for one, other in (ALONE[1:], TOGETHER):
        both = kl.reindex(columns=[one, other]).notna().all(axis=1).to_numpy()
        a, b = kl.reindex(columns=[one, other]).to_numpy()[both].T
        group[f"{one} ÷ {other}"] = statistics.median_ratio(a, b, floor, own[both])
        group[f"mean {one} ÷ mean {other}"] = statistics.ratio_of_means(a, b, floor, own[both])
    return group
