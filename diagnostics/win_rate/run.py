"""`win_rate_report`: the published win rate of two scores with its null, beside Simpson labels and norm exponents.

Every number comes from the tables of `projection_effects`, of one run or several.
"""

import warnings
from collections.abc import Mapping
from typing import Any, cast

from diagnostics.projections.result import ProjectionEffects
from diagnostics.projections.summary import PLACE, noise_floor
from diagnostics.win_rate.adversarial import adversarial_groups
from diagnostics.win_rate.rates import win_rates
from diagnostics.win_rate.result import WinRateReport
from diagnostics.win_rate.simpson import simpson
from diagnostics.win_rate.summary import Contest
from interventions.errors import ResultError
from interventions.progress import Progressing, followed


def win_rate_report(
    runs: Mapping[str, ProjectionEffects],
    *,
    signed: bool = False,
    absolute: bool | None = None,
    min_tokens: int = 10,
    draws: int = 200,
    progress: Progressing = None,
) -> WinRateReport:
    """Win rates of the cosine over the inner product, in every group of runs of `projection_effects`, with what they must be read beside.

    absolute: whether scores enter as |cos| and |inner| (None: where tokens were drawn over all values, as stratified sampling does; as
    published, signed values over active tokens). signed: a win is r_cos > r_inner, not |r_cos| > |r_inner|. draws: tables simulated
    from the pooled fit for the band that range restriction alone predicts. progress: as of `followed`, in groups.
    Raises `ResultError` for no runs, and runs without placebos. Source: arXiv:2606.15054; nulls, bands, labels and errors are ours.
    """
    if not runs:
        raise ResultError("no run; give at least one")
    keyed = {name: list(run.frame.groupby(PLACE, sort=False)) for name, run in runs.items()}
    total, contests = sum(map(len, keyed.values())), []
    with followed(progress, "fitting", "group") as told:
        for name, groups in keyed.items():
            run = runs[name]
            magnitudes = run.provenance["sampling"] != "active" if absolute is None else absolute
            for key, rows in groups:
                place = dict(zip(PLACE, cast(tuple[Any, ...], key), strict=True))
                floor = noise_floor(run.frame, place)
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", UserWarning
                    )  # few prompts: their number stands beside each interval
                    rates = win_rates(rows, edit=run.main, signed=signed, absolute=magnitudes, min_tokens=min_tokens)
                    groups_ = adversarial_groups(rows, edit=run.main, min_tokens=min_tokens)
                    labels, why = None, None
                    try:
                        labels = simpson(
                            rows, floor, edit=run.main, draws=draws, seed=run.provenance["seed"], min_tokens=min_tokens,
                            absolute=magnitudes, signed=signed,
                        )  # fmt: skip
                    except (
                        ResultError
                    ) as error:  # too few rows: the rates stand without labels, and the reason beside them
                        why = str(error)
                own = next(g for g in run.groups if all(g[name_] == place[name_] for name_ in PLACE))
                known = None if own["learned_a"] is None else own["learned_a"]["mean"]
                contests.append(Contest(name, place, rates, groups_, own["exponents"], known, labels, why))
                if told is not None:
                    told(1, total)
    return WinRateReport(contests, dict(runs))
