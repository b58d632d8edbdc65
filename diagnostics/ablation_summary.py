"""Intended and collateral effects by N, with intervals by group of texts, and the comparison of SAEs at one intended effect."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics.statistics import Estimate, FiellerInterval, covariance_from_deletions, fieller_from, from_deletions
from diagnostics.text_groups import sums_without
from interventions.errors import ResultError

FORMS = ("kl", "logit", "probe")
"""Of intended and collateral effect: see `feature_ablation`."""
KEEP = "keep"
_KEYS = ("sae", "layer", "point", "data", "concept", "ranking", "arm")


@dataclass(frozen=True, eq=False)
class Curve:
    """Intended and collateral effect of one arm by N, and what they are without each group of texts."""

    sae: str
    site: str
    data: str
    concept: str
    """of `data`; for a mean over concepts, how many"""
    ranking: str
    arm: str
    form: str
    counts: Int[ndarray, "count"]
    """N, ascending; for `keep` from 0"""
    value: Float[ndarray, "count 2"]
    """intended, collateral"""
    texts: Int[ndarray, "text"]
    """on which it is measured"""
    groups: Int[ndarray, "group"]
    """of them, ascending; as many as texts where none were named"""
    without: Float[ndarray, "group count 2"]
    """the same without each group"""

    def estimate(self, k: int, part: int) -> Estimate:
        """Intended (0) or collateral (1) effect at the k-th N."""
        return from_deletions(float(self.value[k, part]), self.without[:, k, part], len(self.texts))

    def selectivity(self, k: int) -> Estimate:
        """intended/(intended + collateral) in [0, 1]; 0, without an interval, where the intended effect is not above 0. nan where
        both are 0. Ends may leave [0, 1]."""
        whole, parts = selectivity(self.value[k]), selectivity(self.without[:, k])
        if self.value[k, 0] <= 0:
            parts = np.full(len(parts), np.nan)
        return from_deletions(float(whole), parts, len(self.texts))

    def ratio(self, k: int) -> FiellerInterval:
        """intended/collateral with Fieller's interval."""
        covariance, df = covariance_from_deletions(self.without[:, k])
        t = float(stats.t.ppf(0.975, df)) if np.isfinite(df) else 1.0
        (var_a, cov), (_, var_b) = covariance
        a, b = self.value[k]
        size = {"n_rows": len(self.texts), "n_prompts": len(self.groups)}
        return fieller_from(float(a), float(b), float(var_a), float(cov), float(var_b), t, **size)

    def log_ratio(self, k: int) -> Estimate:
        """intended/collateral, the interval by the jackknife of its logarithm; nan unless both are above 0."""
        with np.errstate(all="ignore"):
            whole, parts = (
                np.where((v > 0).all(-1), v[..., 0] / v[..., 1], np.nan) for v in (self.value[k], self.without[:, k])
            )
        return from_deletions(float(whole), parts, len(self.texts), transform="log")

    def recovered(self, k: int, part: int) -> Estimate:
        """1 − effect with N kept / effect with none kept; of the `keep` arm of the KL form, on texts with (0) or without (1) the concept."""
        with np.errstate(all="ignore"):
            whole, parts = (1 - v[..., k, part] / v[..., 0, part] for v in (self.value, self.without))
        return from_deletions(float(whole), parts, len(self.texts))


def selectivity(effects: Float[ndarray, "*any 2"]) -> Float[ndarray, "*any"]:
    """I/(I + C), I the intended effect or 0 if it is below."""
    intended = np.maximum(effects[..., 0], 0)
    with np.errstate(invalid="ignore"):
        return intended / (intended + effects[..., 1])


def curves(frame: pd.DataFrame, forms: Sequence[str]) -> list[Curve]:
    """A curve for each SAE × concept × ranking × arm × form of a table of `feature_ablation`.

    Each text weighs alike; intervals leave out one group at a time. Raises `ResultError` for a table in which an N lacks some text.
    """
    found = []
    for keys, rows in frame.groupby(list(_KEYS), sort=False):
        labels: dict[str, Any] = dict(zip(_KEYS, cast(tuple[Any, ...], keys), strict=True))
        rows = rows.sort_values(["count", "own", "text"], ascending=[True, False, True], kind="stable")
        counts = np.unique(rows["count"].to_numpy())
        if len(rows) % len(counts) or rows.groupby("count")["text"].nunique().nunique() > 1:
            raise ResultError(f"{labels}: not every text has a line at every N; give a whole table")
        shape = len(counts), -1
        own = rows["own"].to_numpy(bool).reshape(shape)[0]
        texts, group = (rows[name].to_numpy().reshape(shape)[0] for name in ("text", "group"))
        columns = {name: rows[name].to_numpy(float).reshape(shape) for name in ("kl", "target_fall", "other_square")}
        columns["fall"] = (rows["class_probe_clean"] - rows["class_probe"]).to_numpy(float).reshape(shape)
        named = {
            "sae": labels["sae"],
            "site": f"{labels['layer']}.{labels['point']}",
            **{name: labels[name] for name in ("data", "concept", "ranking", "arm")},
        }
        for form in forms:
            if form == "probe" and np.isnan(columns["fall"]).any():
                continue  # a data set without classes
            value, groups, without, kept = _effects(columns, own, group, form)
            found.append(
                Curve(**named, form=form, counts=counts, value=value, texts=texts[kept], groups=groups, without=without)
            )
    return found


def _effects(
    columns: dict[str, Float[ndarray, "count text"]], own: ndarray, group: ndarray, form: str
) -> tuple[Float[ndarray, "count 2"], Int[ndarray, "group"], Float[ndarray, "group count 2"], ndarray]:
    """Both effects, the groups of the texts that enter, both effects without each, and which texts these are."""
    kept = own if form == "logit" else np.ones_like(own)
    columns = {name: values[:, kept] for name, values in columns.items()}
    own, group = own[kept], group[kept]
    if form == "logit":
        parts = [_means(columns["target_fall"], own, group), _means(columns["other_square"], own, group)]
        parts[1] = (np.sqrt(parts[1][0]), np.sqrt(parts[1][1]))
    else:
        which = columns["kl"] if form == "kl" else columns["fall"]
        other = which if form == "kl" else np.abs(which)
        parts = [_means(which, own, group), _means(other, ~own, group)]
    value, without = (np.stack(part, axis=-1) for part in zip(*parts, strict=True))
    return value, np.unique(group), without, kept


def _means(values: Float[ndarray, "count text"], of: ndarray, group: ndarray) -> tuple[ndarray, ndarray]:
    """The mean over some texts, and without each group, `[group, count]`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        without = sums_without(np.where(of, values, 0), group) / sums_without(of.astype(float), group)
        return values[:, of].mean(1), np.maximum(without, 0).T if (values >= 0).all() else without.T


def mean_over_concepts(some: Sequence[Curve]) -> list[Curve]:
    """The mean over concepts of each SAE × ranking × arm × form; a group of texts is deleted from all concepts at once."""
    alike: dict[tuple[str, ...], list[Curve]] = {}
    for curve in some:
        alike.setdefault((curve.sae, curve.site, curve.ranking, curve.arm, curve.form), []).append(curve)
    found = []
    for (sae, site, ranking, arm, form), own in alike.items():
        texts, groups = (np.unique(np.concatenate(part)) for part in ([c.texts for c in own], [c.groups for c in own]))
        value = np.mean([c.value for c in own], axis=0)
        without = deleted([(c.groups, c.value, c.without) for c in own], groups)
        head = (sae, site, "all", f"mean of {len(own)}", ranking, arm, form, own[0].counts)
        found.append(Curve(*head, value, texts, groups, without))
    return found


def deleted(parts: Sequence[tuple[ndarray, Any, ndarray]], groups: Int[ndarray, "group"]) -> ndarray:
    """The mean of several statistics without each group, from (groups of one, its value, its value without each of them)."""
    total = np.zeros((len(groups), *np.shape(parts[0][1])))
    for own, value, without in parts:
        whole = np.broadcast_to(value, total.shape).copy()
        whole[np.searchsorted(groups, own)] = without
        total += whole
    return total / len(parts)


def summaries(frame: pd.DataFrame, some: Sequence[Curve]) -> list[dict[str, Any]]:
    """A line for each point of each curve, with intervals; doses beside them."""
    doses = _doses(frame)
    found = []
    for c in some:
        for k, n in enumerate(c.counts.tolist()):
            line: dict[str, Any] = {
                name: getattr(c, name) for name in ("sae", "site", "data", "concept", "ranking", "arm", "form")
            }
            line |= {"count": n, "intended": c.estimate(k, 0), "collateral": c.estimate(k, 1)}
            if c.arm == KEEP:
                line |= {"selectivity": None, "ratio": None}
                known = c.form == "kl"
                line |= {"recovered": c.recovered(k, 0), "recovered_others": c.recovered(k, 1)} if known else {}
            else:
                line |= {"selectivity": c.selectivity(k), "ratio": c.ratio(k)}
            found.append(line | doses[c.sae, c.data, c.concept, c.ranking, c.arm, n])
    return found


def _doses(frame: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, float]]:
    """Mean ‖Δx‖² and share of tokens edited, on texts with and without the concept; latents removed."""
    table = frame.assign(edited=frame["n_edited"] / frame["n_tokens"])
    keys = ["sae", "data", "concept", "ranking", "arm", "count"]
    means = cast(
        pd.DataFrame, table.groupby([*keys, "own"], sort=False)[["delta_square", "edited", "n_latents"]].mean()
    )
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in means.reset_index().to_dict("records"):
        side = "" if row["own"] else "_others"
        found.setdefault(tuple(row[key] for key in keys), {"n_latents": int(row["n_latents"])}).update(
            {f"delta_square{side}": float(row["delta_square"]), f"edited{side}": float(row["edited"])}
        )
    return found


def summary_frame(groups: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The lines as a table: value, low and high of each estimate."""
    lines = []
    for group in groups:
        line = {}
        for name, value in group.items():
            if isinstance(value, Estimate | FiellerInterval):
                line |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
                line |= {f"{name}_kind": value.kind} if isinstance(value, FiellerInterval) else {}
            else:
                line[name] = value
        lines.append(line)
    return pd.DataFrame(lines)
