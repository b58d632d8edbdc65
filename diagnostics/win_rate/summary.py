"""Win rates as tables: one line for each SAE and context, with placebos and intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.projections.norm_exponent import Exponent, Interventional
from diagnostics.results.headlines import Headline
from diagnostics.statistics.estimate import digits
from diagnostics.statistics.tables import TRAINED
from diagnostics.win_rate.adversarial import AdversarialGroups
from diagnostics.win_rate.rates import EditRates, WinRate, WinRates
from diagnostics.win_rate.simpson import SCORES, Simpson

QUARTILES = ("all", "1", "2", "3", "4")
NOTE = (
    "a across tokens: log KL on log|cos| and log||x||; rescaled: the same token's activation 10 % shorter and "
    "longer, beside placebos of equal dose. Win\n"
    "rate: share of latents whose KL correlates more with the cosine than with the inner product; it moves "
    "with the number of tokens whatever is true, so\n"
    "read it beside the placebos', which have the same doses and no meaning. Labels: what becomes of a score's "
    "slope within deciles of ||x|| (pooled less\n"
    "within). cos-high ÷ norm-high: mean KL of tokens with high |cos| and low norm over that of tokens with "
    "low |cos| and high norm; over placebo's: over\n"
    "the same ratio of the placebo. Latents count for as many as they stand for. Brackets: 95 % delete-one-"
    "prompt jackknife, the latents held fixed (a:\n"
    "Fieller)."
)


@dataclass(frozen=True, eq=False)
class Contest:
    """What one group of one run says of cosine against inner product."""

    run: str
    place: dict[str, Any]
    """model, layer, point, context, sae"""
    rates: WinRates
    groups: AdversarialGroups
    exponents: dict[str, Exponent]
    """the headline: see `summary.exponents`"""
    learned_a: float | None
    """mean exponent of a cosine-scored SAE"""
    simpson: Simpson | None
    """None where nothing can be fitted"""
    why_no_labels: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file, the table of latents left to its own file."""
        rates = {k: v for k, v in self.rates.as_dict().items() if k != "latents"}
        labels = None if self.simpson is None else self.simpson.as_dict()
        found = {"run": self.run, **self.place, "win_rates": rates, "adversarial_groups": self.groups.as_dict()}
        found["exponents"] = {name: way.as_dict() for name, way in self.exponents.items()} | {"learned": self.learned_a}
        return found | {"simpson": labels, "why_no_labels": self.why_no_labels}


_BAND: dict[str, Callable[[Any], float]] = {
    "low": lambda b: b.low,
    "high": lambda b: b.high,
    "win_rate": lambda b: b.observed.value,
    "n_latents": lambda b: b.n_latents,
}
_VERSUS: dict[str, Callable[[Any], float]] = {
    "": lambda v: v.estimate.value,
    "_low": lambda v: v.estimate.low,
    "_high": lambda v: v.estimate.high,
    "_p": lambda v: v.p,
}
PLACE = ("run", "model", "context", "block", "SAE")
PARTS = {
    "Norm exponent a (0: cosine, 1: inner product)": (
        "a across tokens", "a of its placebo", "a rescaled", "its placebo's a", "a less placebo's", "a learned", "latents with a < ½ (rescaled)",
    ),
    "Win rate of the cosine": ("latents", "win rate", "placebo token", "placebo isotropic", "less placebo", "true margin > 0"),
    "By quartile of ||x||, and what it is called": (
        "by quartile", "placebo's", "label cosine", "label inner", "label activation", "cos-high ÷ norm-high", "their doses",
        "over placebo's",
    ),
}  # fmt: skip


def frame_of(contests: Sequence[Contest]) -> pd.DataFrame:
    """One line for each run × model × layer × point × context × SAE × edit × quartile of ‖x‖ (`all`: all rows)."""
    lines = []
    for contest in contests:
        labels = contest.simpson
        bands = [None] * 5 if labels is None else [labels.overall, *labels.quartiles]
        edits = [contest.rates.main, *contest.rates.placebos.values()]
        for rates in edits:
            difference = contest.rates.differences.get(rates.edit)
            for i, rate in enumerate((rates.overall, *rates.quartiles)):
                band = bands[i] if rates is contest.rates.main else None
                versus = None if difference is None else (difference.overall, *difference.quartiles)[i]
                line: dict[str, Any] = {"run": contest.run, **contest.place, "edit": rates.edit}
                line |= {"quartile": QUARTILES[i], **_ends(rate)}
                line |= {"absolute": contest.rates.absolute, "signed": contest.rates.signed}
                line |= {f"band_{name}": np.nan if band is None else value(band) for name, value in _BAND.items()}
                line |= {
                    f"main_less_this{name}": np.nan if versus is None else value(versus)
                    for name, value in _VERSUS.items()
                }
                lines.append(line)
    return pd.DataFrame(lines)


def line_of(c: Contest) -> dict[str, Any]:
    """For a reader: exponents, win rates beside the placebos', labels, each with its interval."""
    line: dict[str, Any] = {"run": c.run, "model": c.place["model"], "context": c.place["context"].replace("_", "-")}
    line |= {"block": c.place["layer"], "SAE": c.place["sae"], "latents": c.rates.main.overall.n_latents}
    named = {"observational": "a across tokens", "placebo_token": "a of its placebo", "interventional": "a rescaled"}
    for way, name in named.items():
        if way in c.exponents:
            found = c.exponents[way]
            line[name] = found.a if found.identified else "not identified"
    if isinstance(rescaled := c.exponents.get("interventional"), Interventional):
        line["latents with a < ½ (rescaled)"] = str(rescaled.share_below_half)
        if beside := rescaled.placebos.get("placebo_token"):
            line |= {"its placebo's a": beside.placebo, "a less placebo's": beside.difference}
    line["a learned"] = np.nan if c.learned_a is None else c.learned_a
    line["win rate"] = c.rates.main.overall.estimate
    for name, rates in c.rates.placebos.items():
        line[name.replace("_", " ")] = rates.overall.estimate
    line["by quartile"] = _by_quartile(c.rates.main)
    if "placebo_token" in c.rates.placebos:
        difference = c.rates.differences["placebo_token"].overall
        line["placebo's"] = _by_quartile(c.rates.placebos["placebo_token"])
        line["less placebo"] = f"{difference.estimate}, p {difference.p:.2g}"
    line["true margin > 0"] = str(c.rates.prevalence)
    line |= {"cos-high ÷ norm-high": c.groups.kl_ratio, "their doses": c.groups.dose_ratio}
    if "placebo_token" in c.groups.over_placebos:
        line["over placebo's"] = c.groups.over_placebos["placebo_token"]
    for score in SCORES:
        paradox = None if c.simpson is None else c.simpson.scores.get(score)
        line[f"label {score}"] = "" if paradox is None else f"{paradox.label} ({paradox.difference})"
    return line


def _by_quartile(rates: EditRates) -> str:
    return " ".join(digits(rate.estimate.value, ".2f") for rate in rates.quartiles)


def _ends(rate: WinRate) -> dict[str, Any]:
    low, high = rate.clopper_pearson_iid
    found = {"win_rate": rate.estimate.value, "low": rate.estimate.low, "high": rate.estimate.high}
    found |= {"n_latents": rate.n_latents, "n_wins": rate.n_wins, "n_few": rate.n_few, "n_constant": rate.n_constant}
    return found | {"low_iid": low, "high_iid": high}


def first_numbers(contests: Sequence[Contest], runs: Mapping[str, Any]) -> Iterator[Headline]:
    """Win rates of the model itself in the first context, each beside its placebo's. runs: provenance by name."""
    for c in contests:
        if c.place["model"] == TRAINED and c.place["context"] == runs[c.run]["context"][0]:
            token = c.rates.placebos.get("placebo_token")
            against = "" if token is None else f"its placebo: {token.overall.estimate}"
            words = f"win rate of the cosine, {c.place['sae']}" + (f", {c.run}" if len(runs) > 1 else "")
            yield Headline(words, str(c.rates.main.overall.estimate), against)


def labels_of(found: Simpson | None) -> str:
    """Labels of the scores in a few words: `cos: Simpson, z: none`."""
    if found is None:
        return "no labels"
    names = {"cosine": "cos", "inner": "inner", "activation": "z"}
    return ", ".join(
        f"{names[score]}: {paradox.label}" for score, paradox in found.scores.items() if paradox is not None
    )
