"""The published contest of two scores, replicated with its null, beside what is really there: labels and exponents.

Every number here is formed of the tables of `projection_effects`, of one run or several.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
from typing_extensions import Self

from diagnostics.adversarial import AdversarialGroups, adversarial_groups
from diagnostics.norm_exponent import Exponent
from diagnostics.progress import Progressing, followed
from diagnostics.projection_summary import PLACE, noise_floor
from diagnostics.projections import ProjectionEffects
from diagnostics.results import Shown
from diagnostics.simpsons_paradox import SCORES, Simpson, simpson
from diagnostics.stored import Stored
from diagnostics.study import TRAINED
from diagnostics.wins import EditRates, WinRate, WinRates, win_rates
from interventions.errors import ResultError

QUARTILES = ("all", "1", "2", "3", "4")
NOTE = (
    "a across tokens: log KL on log|cos| and log||x||; rescaled: the same token's activation 10 % shorter and longer. Win rate: share "
    "of latents whose\nKL correlates more with the cosine than with the inner product; it moves with the number of tokens whatever is "
    "true, so read it beside the\nplacebos', which have the same doses and no meaning. Labels: what becomes of a score's slope within "
    "deciles of ||x|| (pooled less within).\ncos-high ÷ norm-high: mean KL of tokens with high |cos| and low norm over that of tokens "
    "with low |cos| and high norm; over placebo's: over the same\nratio of the placebo. Latents count for as many as they stand for. "
    "Brackets: 95 % delete-one-prompt jackknife, the latents held fixed (a: Fieller)."
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
    """the headline: see `projection_summary.exponents`"""
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


@dataclass(frozen=True, eq=False)
class WinRateReport(Shown):
    """Win rates, overall and by quartile of ‖x‖, with their placebos, their bands and what they are called."""

    contests: list[Contest]
    runs: dict[str, ProjectionEffects]
    """the runs that they were formed of, by name"""

    NAME: ClassVar[str] = "win_rate"
    NOTE: ClassVar[str] = NOTE

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """A report formed of its files; its runs without their rows."""
        from diagnostics.contest_files import read_contests

        return cls(*read_contests(stored))

    def parts(self) -> dict[str, Any]:
        """Both tables by the names of their files."""
        return {f"{self.NAME}.parquet": self.frame, f"{self.NAME}_latents.parquet": self.latents}

    @property
    def provenance(self) -> dict[str, Any]:  # type: ignore[override]
        """Of the runs it was formed of, by name."""
        return {name: run.provenance for name, run in self.runs.items()}

    @property
    def frame(self) -> pd.DataFrame:
        """One line for each run × model × layer × point × context × SAE × edit × quartile of ‖x‖ (`all`: all rows)."""
        lines = []
        for contest in self.contests:
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

    @property
    def latents(self) -> pd.DataFrame:
        """One line for each latent: its correlations, its margin with an error, tests of it (`_iid`: rows taken as independent)."""
        return pd.concat([c.rates.latents.assign(run=c.run, **c.place) for c in self.contests], ignore_index=True)

    def to_frame(self) -> pd.DataFrame:
        """The tidy table of win rates."""
        return self.frame

    def summary(self) -> pd.DataFrame:
        """A line for each run and group, for a reader: exponents, win rates beside the placebos', labels, each with its interval."""
        return pd.DataFrame([_line(contest) for contest in self.contests]).fillna("")

    def table(self) -> str:
        """The summary as text, for a terminal, in three parts; and what has no label, with the reason."""
        parts = []
        for title, part in self.tables().items():
            parts += [f"{title}:", part.to_string(index=False)]
        return "\n".join([*parts, *self.without_labels(), NOTE])

    def tables(self) -> dict[str, pd.DataFrame]:
        """The summary in three parts."""
        whole = self.summary()
        place = [name for name in _PLACE if name != "model" or whole["model"].nunique() > 1]
        parts = {title: [*place, *(name for name in columns if name in whole)] for title, columns in _PARTS.items()}
        return {title: cast(pd.DataFrame, whole[columns]) for title, columns in parts.items()}

    def without_labels(self) -> list[str]:
        """Scores that have no label, with the reason."""
        parts = []
        for c in self.contests:
            reasons = {"": c.why_no_labels} if c.simpson is None else c.simpson.reasons
            where = f"{c.run}, {c.place['context'].replace('_', '-')}, {c.place['sae']}"
            parts += [f"{where}: no label{' of ' + score if score else ''}: {why}" for score, why in reasons.items()]
        return parts

    def plot(self) -> Any:
        """Win rate by depth, in context beside the one-token context, with the placebos' band. Returns a matplotlib Figure."""
        from diagnostics.win_rate_plots import plot_win_rate

        return plot_win_rate(self.frame, self.provenance)

    def plot_paradox(self, run: str | None = None, context: str | None = None) -> Any:
        """Overall against within quartiles of one run and context (default: the first), with the band that range restriction alone
        predicts. Returns a matplotlib Figure."""
        from diagnostics.win_rate_plots import plot_paradox

        run = next(iter(self.runs)) if run is None else run
        if run not in self.runs:
            raise ResultError(f"no run {run!r} in this report; known: {', '.join(self.runs)}")
        where = str(context or self.runs[run].provenance["context"][0])
        own = [c for c in self.contests if (c.run, c.place["context"], c.place["model"]) == (run, where, TRAINED)]
        labels = {c.place["sae"]: _labels(c.simpson) for c in own}
        return plot_paradox(self.frame, self.provenance, labels, run, where)

    def figures(self) -> dict[str, Any]:
        """Win rates by depth; overall against within quartiles, for each run."""
        found = {self.NAME: self.plot()}
        for i, run in enumerate(self.runs):
            found[f"{self.NAME}_paradox" + (f"_{run.replace('/', '_')}" if i else "")] = self.plot_paradox(run)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Every group's numbers, and the provenance of every run."""
        return {"summary": [contest.as_dict() for contest in self.contests], "provenance": self.provenance}

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """The files that every report has."""
        return (f"{cls.NAME}.parquet", f"{cls.NAME}_latents.parquet", f"{cls.NAME}.json")


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
_PLACE = ("run", "model", "context", "block", "SAE")
_PARTS = {
    "Norm exponent a (0: cosine, 1: inner product)": (
        "a across tokens", "a of its placebo", "a rescaled", "a learned", "latents with a < ½ (rescaled)",
    ),
    "Win rate of the cosine": ("latents", "win rate", "placebo token", "placebo isotropic", "less placebo", "true margin > 0"),
    "By quartile of ||x||, and what it is called": (
        "by quartile", "placebo's", "label cosine", "label inner", "label activation", "cos-high ÷ norm-high", "their doses",
        "over placebo's",
    ),
}  # fmt: skip


def _line(c: Contest) -> dict[str, Any]:
    line: dict[str, Any] = {"run": c.run, "model": c.place["model"], "context": c.place["context"].replace("_", "-")}
    line |= {"block": c.place["layer"], "SAE": c.place["sae"], "latents": c.rates.main.overall.n_latents}
    named = {"observational": "a across tokens", "placebo_token": "a of its placebo", "interventional": "a rescaled"}
    for way, name in named.items():
        if way in c.exponents:
            found = c.exponents[way]
            line[name] = str(found.a) if found.identified else "not identified"
    if "interventional" in c.exponents:
        line["latents with a < ½ (rescaled)"] = str(c.exponents["interventional"].share_below_half)
    line["a learned"] = "" if c.learned_a is None else f"{c.learned_a:.2f}"
    line["win rate"] = str(c.rates.main.overall.estimate)
    for name, rates in c.rates.placebos.items():
        line[name.replace("_", " ")] = str(rates.overall.estimate)
    line["by quartile"] = _by_quartile(c.rates.main)
    if "placebo_token" in c.rates.placebos:
        difference = c.rates.differences["placebo_token"].overall
        line["placebo's"] = _by_quartile(c.rates.placebos["placebo_token"])
        line["less placebo"] = f"{difference.estimate}, p {difference.p:.2g}"
    line["true margin > 0"] = str(c.rates.prevalence)
    line |= {"cos-high ÷ norm-high": str(c.groups.kl_ratio), "their doses": str(c.groups.dose_ratio)}
    if "placebo_token" in c.groups.over_placebos:
        line["over placebo's"] = str(c.groups.over_placebos["placebo_token"])
    for score in SCORES:
        paradox = None if c.simpson is None else c.simpson.scores.get(score)
        line[f"label {score}"] = "" if paradox is None else f"{paradox.label} ({paradox.difference})"
    return line


def _labels(found: Simpson | None) -> str:
    """Labels of the scores in a few words: `cos: Simpson, z: none`."""
    if found is None:
        return "no labels"
    names = {"cosine": "cos", "inner": "inner", "activation": "z"}
    return ", ".join(
        f"{names[score]}: {paradox.label}" for score, paradox in found.scores.items() if paradox is not None
    )


def _by_quartile(rates: EditRates) -> str:
    return " ".join(f"{rate.estimate.value:.2f}" for rate in rates.quartiles)


def _ends(rate: WinRate) -> dict[str, Any]:
    low, high = rate.clopper_pearson_iid
    found = {"win_rate": rate.estimate.value, "low": rate.estimate.low, "high": rate.estimate.high}
    found |= {"n_latents": rate.n_latents, "n_wins": rate.n_wins, "n_few": rate.n_few, "n_constant": rate.n_constant}
    return found | {"low_iid": low, "high_iid": high}


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
