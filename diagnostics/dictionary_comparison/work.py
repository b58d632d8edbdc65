"""The work of a comparison of dictionaries, unit by unit: each SAE's latents, each pair, ablations, labelled texts."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from diagnostics.dictionary_comparison.ablations import ablations
from diagnostics.dictionary_comparison.activity import Activity, near_duplicates, pair_correlations, random_rows, usable
from diagnostics.dictionary_comparison.gradients import entry_gradients
from diagnostics.dictionary_comparison.matching import Matching, Partners, matched
from diagnostics.dictionary_comparison.probing_gap import LabelledTexts, gap_lines
from diagnostics.dictionary_comparison.quartiles import QUARTILES, Sample, counted, gradient_ratios, quartile_shares
from diagnostics.running.recordings import Recordings
from diagnostics.running.units import Unit, narrowed
from diagnostics.sampling.counted import Tokens
from diagnostics.sampling.tokens import generator
from interventions.errors import ResultError
from interventions.models.causal_model import CausalModel
from interventions.recording import record
from interventions.texts.prompts import Prompts
from sae_models.active_latents import ActiveLatents, active_latents
from sae_models.dictionaries import Dictionary
from sae_models.live import Wrapped

RATIOS = ("gradient", "error", "error_norm", "sensitivity")
"""Of `EntryGradients`, whose means in the fourth and first quartile of ‖x‖ are compared."""
CLASSES = ("matched", "shared", "unique")
"""Of a dictionary's usable latents against another: with a match of its own there; in agreement with latents there that are others'
matches; in agreement with none."""
Made = tuple[pd.DataFrame, dict[str, Any]]


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison asks for: see `compare_dictionaries`."""

    correlation: float
    cosine: float
    duplicate_cosine: float
    min_active: int
    min_quartile: int
    hungarian_limit: int
    causal_latents: int
    causal_tokens: int
    sink_filter: float | None
    skip_first: int
    seed: int

    def check(self, n_saes: int) -> None:
        """Raises `ResultError` for fewer than two SAEs and settings out of range."""
        if n_saes < 2:
            raise ResultError(f"{n_saes} SAE; a comparison needs two or more")
        thresholds = {name: getattr(self, name) for name in ("correlation", "cosine", "duplicate_cosine")}
        if wrong := [f"{name} {value}" for name, value in thresholds.items() if not 0 < value <= 1]:
            raise ResultError(f"threshold {wrong[0]}; expected a number above 0, up to 1")
        counts = ("min_active", "min_quartile", "hungarian_limit", "causal_tokens")
        if wrong := [f"{name} {getattr(self, name)}" for name in counts if getattr(self, name) < 1]:
            raise ResultError(f"{wrong[0]}; expected 1 or more")
        if self.causal_latents < 0 or (self.sink_filter or 0) < 0 or self.skip_first < 0:
            raise ResultError(
                f"causal_latents {self.causal_latents}, sink_filter {self.sink_filter}, skip_first {self.skip_first}; expected 0 or more"
            )


class Comparison:
    """Computes units; what several of them need is kept."""

    def __init__(
        self,
        model: CausalModel,
        prompts: Prompts,
        dictionaries: list[Dictionary],
        labelled: dict[str, LabelledTexts],
        plan: ComparisonPlan,
        how: dict[str, Any],
    ):
        self.model, self.prompts, self.labelled, self.plan, self.how = model, prompts, labelled, plan, how
        self.dictionaries = {d.name: d for d in dictionaries}
        self.site = dictionaries[0].site
        self.recordings = Recordings(model, prompts.tokens, [self.site])
        self.active = cache(self._active)
        self.activity = cache(self._activity)
        self.matches: dict[tuple[str, str], ndarray] = {}
        """(latent, latent) of each pair of SAEs, for `discovery`"""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("active", "activity")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.active, self.activity = cache(self._active), cache(self._activity)

    def prepare(self, stage: str) -> None:
        """Form what all units share."""
        _ = self.sample

    def units(self) -> list[Unit]:
        """All but those of labelled texts, which need the others' matches."""
        names = list(self.dictionaries)
        found = [Unit.of(part="latents", sae=name) for name in names]
        found += [Unit.of(part="duplicates", sae=name) for name in names]
        found += [Unit.of(part="pair", sae=a, other=b) for i, a in enumerate(names) for b in names[i + 1 :]]
        if self.plan.causal_latents:
            found += [Unit.of(part="ablations", sae=name) for name in names]
        return found

    def __call__(self, unit: Unit, tick: Any) -> Made:
        parts = {"latents": self._latents, "duplicates": self._duplicates, "ablations": self._ablations}
        if unit["part"] == "pair":
            return self._pair(unit["sae"], unit["other"])
        return self._discovery(unit["data"]) if unit["part"] == "discovery" else parts[unit["part"]](unit["sae"])

    @cached_property
    def sample(self) -> tuple[Sample, dict[str, Any]]:
        """The tokens that count, and what is to be said of them."""
        recording = record(self.model, self.prompts.tokens, [self.site], keep_cache=False)
        return counted(Tokens(recording, self.site, self.prompts.special, self.plan.sink_filter, self.plan.skip_first))

    def _active(self, name: str) -> ActiveLatents:
        sae = self.dictionaries[name].sae
        assert sae is not None
        return active_latents(sae, self.sample[0].x)

    def _activity(self, name: str) -> Activity:
        return Activity.of(self.active(name).matrix(), self.dictionaries[name].directions)

    def _latents(self, name: str) -> Made:
        dictionary, active, sample, plan = self.dictionaries[name], self.active(name), self.sample[0], self.plan
        assert dictionary.sae is not None
        n, quartile, prompt = dictionary.sae.d_sae, sample.quartile[active.token], sample.prompt[active.token]
        fired = np.bincount(active.latent, minlength=n)
        by = np.bincount(active.latent * 4 + quartile, minlength=4 * n).reshape(n, 4)
        some = np.maximum(fired, 1)
        live = np.where(fired > 0, 1.0, np.nan)
        table: dict[str, Any] = {
            "sae": name,
            "latent": np.arange(n, dtype=np.int32),
            "fired": fired,
            "frequency": fired / active.n_tokens,
            "usable": usable(self.activity(name), plan.min_active),
            "mean_activation": live * np.bincount(active.latent, active.z, n) / some,
            "negative_share": live * np.bincount(active.latent, active.z < 0, n) / some,
            **{f"share_{q}": live * by[:, i] / some for i, q in enumerate(QUARTILES)},
            **_alignment(dictionary),
        }
        line: dict[str, Any] = {"sae": name, "latents": n, "silent": int((fired == 0).sum())}
        line["rare"] = n - line["silent"] - int(table["usable"].sum())
        line |= {"usable": int(table["usable"].sum()), "l0": len(active) / active.n_tokens}
        shares = quartile_shares(active, sample, table["usable"])
        line |= {f"share_{q}": share.as_dict() for q, share in zip(QUARTILES, shares, strict=True)}
        for kind in RATIOS:
            table[f"{kind}_ratio"] = np.full(n, np.nan)
        if not isinstance(dictionary.sae.score, Wrapped):
            ends = np.isin(quartile, (0, 3))  # the quartiles that are compared
            few = ActiveLatents(active.token[ends], active.latent[ends], active.z[ends], active.n_tokens, n)
            norms = entry_gradients(dictionary.sae, sample.x, few)
            cell = few.latent * 4 + quartile[ends]
            for kind in RATIOS:
                values = getattr(norms, kind)
                ratio, above = gradient_ratios(
                    prompt[ends], cell, values, n, np.unique(sample.prompt), plan.min_quartile
                )
                table[f"{kind}_ratio"] = ratio
                known = ratio[np.isfinite(ratio)]
                line |= {
                    f"{kind}_above_2": above.as_dict(),
                    f"{kind}_median": float(np.median(known)) if len(known) else None,
                }
                line[f"{kind}_latents"] = len(known)
        return narrowed(pd.DataFrame(table)), {"line": line, "tokens": self.sample[1]}

    def _duplicates(self, name: str) -> Made:
        own = self.activity(name)
        i, j, cos = near_duplicates(own, self.plan.duplicate_cosine)
        r = pair_correlations(own, own, i, j)
        table = {"sae": [name] * len(i), "latent": i, "other": j, "cosine": cos, "correlation": r}
        return narrowed(pd.DataFrame(table)), {}

    def _pair(self, a: str, b: str) -> Made:
        sides, plan, sample = (self.activity(a), self.activity(b)), self.plan, self.sample[0]
        n = len(sample.prompt)
        settings = {name: getattr(plan, name) for name in ("correlation", "cosine", "min_active")}
        found = matched(*sides, **settings, limit=plan.hungarian_limit)
        null = matched(sides[0], sides[1].rotated(n // 2), **settings, limit=plan.hungarian_limit)
        lines, tables = [], []
        for own, other, side, chance, place in ((a, b, found.a, null.a, 0), (b, a, found.b, null.b, 1)):
            able = usable(sides[place], plan.min_active)
            line = {
                "sae": own,
                "other": other,
                "same_seed": self._same_seed(a, b),
                "usable": int(able.sum()),
                "method": found.method,
            }
            line |= self._shares(side, able, chance, self.active(own))
            line |= self._mcs(sides[place], sides[1 - place], side)
            lines.append(line)
            tables.append(_partners(own, other, side, able))
        own_prompt = float((np.roll(sample.prompt, n // 2) == sample.prompt).mean())
        notes = {"lines": lines, "null_own_prompt": own_prompt, "matches": _matches(found).tolist()}
        return narrowed(pd.concat(tables, ignore_index=True)), notes

    def _same_seed(self, a: str, b: str) -> bool | None:
        """Whether both were trained from one seed: the same start and the same batches make latents alike. None: not known."""
        saes = (self.dictionaries[a].sae, self.dictionaries[b].sae)
        seeds = [None if sae is None else (sae.metadata.get("recipe") or {}).get("seed") for sae in saes]
        return None if None in seeds else seeds[0] == seeds[1]

    def _shares(self, side: Partners, able: ndarray, chance: Partners, active: ActiveLatents) -> dict[str, Any]:
        n, classes = max(1, int(able.sum())), side.classes(able)
        line: dict[str, Any] = {name: int(members.sum()) for name, members in classes.items()}
        line |= {
            "matched_share": line["matched"] / n,
            "matched_share_null": int((able & (chance.match >= 0)).sum()) / n,
        }
        line["agreeing_share"] = int((able & side.agrees).sum()) / n
        line["best_correlation_null"] = _quantile(chance.correlation[able & (chance.partner >= 0)], 0.99)
        for name, members in classes.items():
            for q, share in zip(QUARTILES, quartile_shares(active, self.sample[0], members), strict=True):
                line[f"{name}_{q}"] = share.as_dict()
        return line

    def _mcs(self, own: Activity, other: Activity, side: Partners) -> dict[str, Any]:
        live = own.fired > 0
        mcs = side.mcs[live]
        line: dict[str, Any] = {"mcs": float(mcs.mean()) if len(mcs) else None, "mcs_all": float(side.mcs.mean())}
        line |= {f"mcs_{q:g}": _quantile(mcs, q) for q in (0.1, 0.5, 0.9)}
        line["stable_share"] = float(side.stable[live].mean()) if len(mcs) else None
        for kind in ("isotropic", "covariance"):
            stream = generator(self.plan.seed, "random rows", self.site, kind, len(other.rows))
            rows = random_rows(other.rows, stream, kind == "isotropic")
            best = _largest_cosine(
                own.rows[torch.from_numpy(live).to(own.rows.device)], rows, own.signed or other.signed
            )
            line[f"mcs_null_{kind}"] = float(best.mean()) if len(best) else None
        return line

    def _ablations(self, name: str) -> Made:
        plan = self.plan
        return ablations(
            self.recordings,
            self.sample[0],
            self.dictionaries[name],
            self.active(name),
            latents=plan.causal_latents,
            tokens=plan.causal_tokens,
            seed=plan.seed,
            **self.how,
        )

    def _discovery(self, data: str) -> Made:
        texts = self.labelled[data]
        recording = record(self.model, texts.prompts.tokens, [self.site], keep_cache=False)
        plan = self.plan
        sample, said = counted(Tokens(recording, self.site, texts.prompts.special, plan.sink_filter, plan.skip_first))
        table, lines = gap_lines(texts, self.dictionaries, sample, self.matches, plan.seed)
        said["texts without a token that counts"] = len(texts.labels) - len(table)
        return narrowed(table), {"lines": lines, "tokens": said}


@torch.no_grad()
def _alignment(dictionary: Dictionary) -> dict[str, ndarray]:
    """<w_i, d_i> and the cosine of the two; nan where the encoder has no rows."""
    if dictionary.rows is None:
        none = np.full(len(dictionary), np.nan)
        return {"alignment": none, "alignment_cosine": none}
    w, d = dictionary.rows.double(), dictionary.directions.double()
    inner = (w * d).sum(-1)
    length = (w.norm(dim=-1) * d.norm(dim=-1)).clamp(min=1e-30)
    return {"alignment": inner.cpu().numpy(), "alignment_cosine": (inner / length).cpu().numpy()}


def _partners(own: str, other: str, side: Partners, able: ndarray) -> pd.DataFrame:
    kind = np.select(list(side.classes(able).values()), CLASSES, default="not usable")
    columns = {"sae": own, "other": other, "latent": np.arange(len(able)), "class": kind, "partner": side.partner}
    columns |= {"correlation": side.correlation, "cosine": side.cosine, "match": side.match}
    return pd.DataFrame(columns | {"mcs": side.mcs, "stable": side.stable})


def _matches(found: Matching) -> Int[ndarray, "pair 2"]:
    own = np.flatnonzero(found.a.match >= 0)
    return np.stack([own, found.a.match[own]], axis=1)


def _largest_cosine(rows: torch.Tensor, others: torch.Tensor, signed: bool) -> Float[ndarray, "latent"]:
    parts = []
    for part in rows.split(1024):
        cos = part @ others.T
        parts.append((cos.abs() if signed else cos).amax(dim=1))
    return torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)


def _quantile(values: ndarray, q: float) -> float | None:
    return float(np.quantile(values, q)) if len(values) else None
