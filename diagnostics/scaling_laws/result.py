"""The result of a scaling grid: sums by prompt, the law's fits, statistics, tables and figures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from diagnostics.results.headlines import Headline
from diagnostics.results.result import Result
from diagnostics.scaling_laws.fit import FORMS, JOINT
from diagnostics.scaling_laws.laws import ERROR, LAST
from diagnostics.scaling_laws.summary import MEASURES, Measured, ablation_groups, exit_groups, loss_groups
from diagnostics.statistics.estimate import Estimate

EMPTY: dict[str, Any] = {
    "part": "", "form": "", "condition": "", "what": "", "sae": "", "n": np.nan, "k": np.nan, "seed": np.nan, "layer": np.nan,
    "share": np.nan, "value": None, "low_prompts": np.nan, "high_prompts": np.nan, "observed": np.nan, "seeds": np.nan,
    "seeds_low": np.nan, "seeds_high": np.nan, "note": "",
}  # fmt: skip
"""What every group has."""


@dataclass(frozen=True)
class ScalingLaws(Result):
    """Errors of a grid of SAEs by width n and active latents k, the joint law fitted to them, and the model's loss with them spliced in.

    The table has a line for each SAE × prompt: sums over its counted tokens, `error` Σ‖x − x̂‖², and over its spliced ones `kl` and `ce`
    (nats).
    """

    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each SAE: `d_sae` (n), `k`, `seed`, `condition`, mean number of active latents `l0`, share of `silent` latents"""
    text: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each prompt: `n_tokens`, `variance` Σ‖x − x̄‖², `n_spliced`, `ce_clean`, `kl_zero`, `ce_zero`"""
    exits: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each block × prompt: `n`, `ce` when the model stops after the block, `share` of its compute; empty without early exits"""
    fits: pd.DataFrame = field(default_factory=pd.DataFrame)
    """a line for each number of a fit and each prediction: see `laws.law_rows`"""

    NAME: ClassVar[str] = "scaling_laws"
    TITLE: ClassVar[str] = "Scaling laws"
    QUESTION: ClassVar[str] = "How does an SAE's error fall with its width and its number of active latents?"
    TABLES: ClassVar[Mapping[str, str]] = {
        "runs": "scaling_runs.parquet", "text": "scaling_text.parquet", "exits": "scaling_exits.parquet", "fits": "scaling_fits.parquet",
    }  # fmt: skip
    NOTE: ClassVar[str] = (
        "Losses, ablations: 95 % delete-one-prompt jackknife intervals. Fits: 95 % percentiles of refits to resampled runs and prompts "
        "(over prompts: these SAEs). Predictions: for an SAE trained anew. Equivalent compute: an upper bound, by untrained early exits."
    )

    @cached_property
    def measured(self) -> Measured:
        """The sums, as statistics take them."""
        return Measured(self.runs, self.frame, self.text, self.exits)

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """`part`: fit, held out, loss (of each SAE), ablation (paired by seed), exit (of the model)."""
        found = []
        for row in self.fits.to_dict("records"):
            ends = row.pop("value"), row.pop("low"), row.pop("high")
            found.append({**row, "value": Estimate(*ends, np.nan, len(self.measured.cells()), len(self.text))})
        measured = self.measured
        found += [*loss_groups(measured), *ablation_groups(measured), *exit_groups(measured)]
        return [EMPTY | g for g in found]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Fits; predictions of the largest width; forms compared; the SAEs; ablations; early exits."""
        fits = [
            {
                "form": g["form"],
                "number": g["what"],
                "k": g["k"],
                "value": g["value"],
                "over prompts": _ends(g),
                "note": g["note"],
            }
            for g in self.select(part="fit")
        ]
        held = self.select(part="held out")
        predicted = [
            {
                "form": g["form"],
                "n": g["n"],
                "k": g["k"],
                "predicted": g["value"],
                "observed": g["observed"],
                "inside": _inside(g),
            }
            for g in held
            if g["what"] == "loss"
        ]
        errors = [
            {"form": g["form"], ERROR: g["value"], "note": g["note"]} for g in held if g["what"] in (ERROR, "failed")
        ]
        losses: dict[str, dict[str, Any]] = {}
        for g in self.select(part="loss"):
            line = losses.setdefault(
                g["sae"], {"n": g["n"], "k": g["k"], "condition": g["condition"], "seed": g["seed"]}
            )
            line[g["what"]] = g["value"]
        ablations = [
            {
                "condition": g["condition"], "n": g["n"], "k": g["k"], "what": g["what"], "mean over seeds": g["value"],
                "range over seeds": _range(g), "seeds": g["seeds"],
            }
            for g in self.select(part="ablation")
        ]  # fmt: skip
        exits = [{"after block": g["layer"], "compute": g["share"], "CE": g["value"]} for g in self.select(part="exit")]
        titles = {
            "Fits": fits,
            "The largest width, predicted from the others": predicted,
            "Forms by their error there": errors,
            f"SAEs ({'; '.join(f'{name}: {said}' for name, said in MEASURES.items())})": list(losses.values()),
            "Ablations against the base, paired by seed": ablations,
            "Early exits": exits,
        }
        return {title: pd.DataFrame(lines) for title, lines in titles.items() if lines}

    def headlines(self) -> Iterator[Headline]:
        """The exponents of n, the prediction of the largest width, ablations, equivalent compute."""
        for g in self.select(part="fit", form=JOINT):
            if g["what"] == "exponent of n":
                yield Headline(f"exponent of n at k = {g['k']:g}", str(g["value"]), "0: width does not matter")
            elif g["what"] in ("gamma", "eta"):
                yield Headline(f"{g['what']} of the joint law", str(g["value"]), "0: no such term")
            elif g["what"] == "failed":
                yield Headline("fit of the joint law", "missing", g["note"])
        errors = {g["form"]: g["value"].value for g in self.select(part="held out", what=ERROR)}
        if JOINT in errors:
            others = "; ".join(f"{form}: {e:.3g}" for form, e in errors.items() if form != JOINT)
            yield Headline(f"{ERROR}, joint law, largest width", f"{errors[JOINT]:.3g}", others)
        for g in self.select(part="ablation"):
            if g["what"] == "nmse ratio":
                what = f"normalised MSE, {g['condition']} ÷ base, n = {g['n']:g}, k = {g['k']:g} ({g['seeds']:g} seeds)"
                yield Headline(what, str(g["value"]), "1: no difference")

    def own_caveats(self) -> list[str]:
        """What the fits and the ladder of exits cannot say."""
        found = [
            f"{g['form']} ({g['part']}): {g['note']}"
            for g in self.groups
            if g["note"] and g["what"] in (*FORMS[JOINT][:1], "failed")
        ]
        found += [f"early exits: {said}" for said in self.provenance["exits_notes"]]
        return list(dict.fromkeys(found))

    def plot(self) -> Any:
        """Normalised MSE against width with the fit to all but the largest; cross-entropy against compute. Returns a matplotlib Figure."""
        from diagnostics.scaling_laws.figures import plot_scaling

        return plot_scaling(self.groups, self.provenance)


def _ends(g: Mapping[str, Any]) -> str:
    return "" if np.isnan(g["low_prompts"]) else f"[{g['low_prompts']:.3g}, {g['high_prompts']:.3g}]"


def _range(g: Mapping[str, Any]) -> str:
    return "" if np.isnan(g["seeds_low"]) else f"{g['seeds_low']:.3g} to {g['seeds_high']:.3g}"


def _inside(g: Mapping[str, Any]) -> str:
    """Whether the observed loss lies in the interval of its prediction."""
    value = g["value"]
    if g["form"] == LAST or np.isnan(value.low):
        return ""
    return "yes" if value.low <= g["observed"] <= value.high else "no"
