"""How well cheap scores of latents agree with exact effects: rank correlation, recall and false negatives, with intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from diagnostics import statistics
from diagnostics.atlas.draws import EXACT, draws_headline
from diagnostics.atlas.scores import DRAWS, SCORES
from diagnostics.results.headlines import Headline
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.tables import few_prompts, with_ends

FIRST = 5
"""Number of a token's largest effects that a score should find."""
LARGE = 0.9
"""Quantile of a group's effects above which an effect is large."""
BINS = 20
NOT_CHEAP = ("delta_norm", "z", "second_order")
"""The dose, with its likes, and what costs more than the effect itself: not among the scores that the headline sets beside the dose."""
LABELS = {
    "delta_norm": "dose ‖z·d‖",
    "z": "activation |z|",
    "cosine": "|cos(x, d)|",
    "inner": "|<x, d̂>|",
    "direct": "direct logit attribution",
    "gradient": "gradient attribution",
    "integrated": "integrated gradients",
    "fisher": "sampled Fisher (predicts KL)",
    "second_order": "exact second order (predicts KL)",
}


@dataclass(frozen=True)
class ByToken:
    """Rows of an atlas by token, for statistics over the latents of each token."""

    token: Int[ndarray, "row"]
    """consecutive numbers from 0"""
    prompt: Int[ndarray, "token"]
    count: Int[ndarray, "token"]

    @classmethod
    def of(cls, prompt: Int[ndarray, "row"], position: Int[ndarray, "row"]) -> "ByToken":
        key = prompt.astype(np.int64) * (int(position.max(initial=0)) + 1) + position
        _, first, token, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        return cls(token, prompt[first], count)

    def ranks(self, value: Float[ndarray, "row"]) -> Int[ndarray, "row"]:
        """Rank of each row within its token, 0 the smallest; ties by order."""
        order = np.lexsort((value, self.token))
        start = np.cumsum(self.count) - self.count
        ranks = np.empty(len(value), dtype=np.int64)
        ranks[order] = np.arange(len(value)) - start[self.token[order]]
        return ranks

    def sums(self, value: ndarray) -> Float[ndarray, "token"]:
        return np.bincount(self.token, value, len(self.count))


def rank_correlations(tokens: ByToken, one: Int[ndarray, "row"], other: Int[ndarray, "row"]) -> Float[ndarray, "token"]:
    """Spearman's ρ of two rankings within each token; nan for tokens with fewer than three latents."""
    n = tokens.count.astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(n >= 3, 1 - 6 * tokens.sums((one - other.astype(float)) ** 2) / (n * (n * n - 1)), np.nan)


def first_of(tokens: ByToken, rank: Int[ndarray, "row"], k: int) -> Bool[ndarray, "row"]:
    """The k rows of each token with the largest values."""
    return rank >= tokens.count[tokens.token] - k


def score_statistics(
    score: Float[ndarray, "row"], effect: Float[ndarray, "row"], tokens: ByToken
) -> dict[str, Estimate]:
    """How well |score| finds large effects:

        rank             Spearman's ρ with the effect among a token's latents, mean over tokens
        recall           share of a token's 5 largest effects that are among its 5 largest scores, over tokens with 10 latents or more
        captured         effect of the 5 with the largest scores over that of the 5 with the largest effects, mean over tokens
        false_negatives  of rows with an effect above the 90th percentile of all, the share whose score is below the median score

    Delete-one-prompt jackknife; thresholds are held fixed.
    """
    prompt, size = tokens.prompt[tokens.token], np.abs(score)
    by_score, by_effect = tokens.ranks(size), tokens.ranks(effect)
    rho = rank_correlations(tokens, by_score, by_effect)
    many, known = tokens.count >= 2 * FIRST, np.isfinite(rho)
    top_score, top_effect = first_of(tokens, by_score, FIRST), first_of(tokens, by_effect, FIRST)
    recall = tokens.sums(top_score & top_effect) / FIRST
    caught, best = tokens.sums(effect * top_score), tokens.sums(effect * top_effect)
    some = many & (best > 0)
    large = effect >= np.quantile(effect, LARGE)
    missed = size[large] < np.median(size)
    return {
        "rank": statistics.mean(rho[known], tokens.prompt[known]),
        "recall": statistics.mean(recall[many], tokens.prompt[many], transform="logit"),
        "captured": statistics.mean(caught[some] / best[some], tokens.prompt[some], transform="logit"),
        "false_negatives": statistics.share(missed, prompt[large]),
    }


def rank_difference(
    one: Float[ndarray, "row"], other: Float[ndarray, "row"], effect: Float[ndarray, "row"], tokens: ByToken
) -> Estimate:
    """ρ of |one| with the effect minus that of |other|, within each token, mean over tokens. Delete-one-prompt jackknife."""
    ranks = tokens.ranks(effect)
    apart = rank_correlations(tokens, tokens.ranks(np.abs(one)), ranks)
    apart = apart - rank_correlations(tokens, tokens.ranks(np.abs(other)), ranks)
    known = np.isfinite(apart)
    return statistics.mean(apart[known], tokens.prompt[known])


def calibration(
    predicted: Float[ndarray, "row"], exact: Float[ndarray, "row"], bins: int = BINS
) -> list[dict[str, float]]:
    """Bins of equal numbers of rows by predicted effect: medians and means of both, quartiles of the exact effects."""
    if not len(predicted):
        return []
    edges = np.quantile(predicted, np.linspace(0, 1, bins + 1))
    which = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, bins - 1)
    found = []
    for i in range(bins):
        own = which == i
        if own.any():
            low, middle, high = np.quantile(exact[own], (0.25, 0.5, 0.75))
            found.append(
                {
                    "predicted": float(np.median(predicted[own])), "low": float(low), "median": float(middle),
                    "high": float(high), "mean": float(exact[own].mean()),
                    "mean_predicted": float(predicted[own].mean()), "rows": int(own.sum()),
                }
            )  # fmt: skip
    return found


@few_prompts()
def summaries(frame: pd.DataFrame, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Statistics of each SAE, by depth. Scores are compared on the tokens that have all of them."""
    found = []
    for name in provenance["saes"]:
        rows = cast(pd.DataFrame, frame.loc[frame.sae == name])
        if len(rows):
            found.append(_group(name, rows, provenance["atlas"][name]))
    return sorted(found, key=lambda g: g["layer"])


def _group(name: str, rows: pd.DataFrame, notes: dict[str, Any]) -> dict[str, Any]:
    prompt, kl = rows.prompt.to_numpy(), rows.kl.to_numpy(float)
    placebo = rows.kl_placebo.notna().to_numpy()
    sorted_kl, floor = np.sort(kl)[::-1], notes["noise_floor"] or 0.0
    both = kl[placebo], rows.kl_placebo.to_numpy(float)[placebo], floor, prompt[placebo]
    group: dict[str, Any] = {
        "sae": name, "layer": int(rows.layer.iloc[0]), "point": str(rows.point.iloc[0]), "rows": len(rows),
        "tokens": notes["tokens"], "prompts": len(np.unique(prompt)), "latents": int(rows.latent.nunique()),
        "latents_a_token": len(rows) / notes["tokens"],
        "kl": statistics.median(kl, prompt), "mean_kl": statistics.mean_alone(kl, prompt),
        "kl_direct": statistics.median(rows.kl_direct.to_numpy(float), prompt),
        "top1_changed": statistics.share(rows.top1_changed.to_numpy(), prompt),
        "relative_dose": float((rows.delta_norm / rows.norm).mean()),
        "share_of_largest_hundredth": float(sorted_kl[: max(1, len(kl) // 100)].sum() / kl.sum()) if kl.sum() else np.nan,
        "kl_over_placebo": statistics.median_ratio(*both) if placebo.any() else None,
        "mean_kl_over_placebo": statistics.ratio_of_means(*both) if placebo.any() else None,
        "noise_floor": floor, "share_below_floor": float((kl <= floor).mean()),
    }  # fmt: skip
    asked = [
        score for score in SCORES if score in rows and rows[score].notna().any()
    ]  # older atlases lack the last one
    own = rows.loc[rows[asked].notna().all(axis=1)]
    among = ByToken.of(own.prompt.to_numpy(), own.position.to_numpy())
    effect = own.kl.to_numpy(float)
    group["scored_tokens"], group["scored_rows"] = len(among.count), len(own)
    many = among.count[among.count >= 2 * FIRST]
    group["chance_recall"] = float((FIRST / many).mean()) if len(many) else np.nan
    group["scores"] = {s: score_statistics(own[s].to_numpy(float), effect, among) for s in asked}
    forms = {} if "second_order" not in asked else {str(n): f"fisher_{n}" for n in DRAWS} | {EXACT: "second_order"}
    dose = own.delta_norm.to_numpy(float)
    group["draws"] = {
        n: score_statistics(score, effect, among) | {"over_dose": rank_difference(score, dose, effect, among)}
        for n, score in ((n, own[form].to_numpy(float)) for n, form in forms.items())
    }
    group["calibration"] = _calibrations(own, asked)
    return group


def _calibrations(own: pd.DataFrame, asked: Sequence[str]) -> dict[str, Any]:
    """Predicted against exact effects: KL for second-order forms, the fall of log p(clean top token) for gradients."""
    found: dict[str, Any] = {}
    prompt, kl = own.prompt.to_numpy(), own.kl.to_numpy(float)
    for name in ("fisher", "second_order"):
        if name in asked:
            form = own[name].to_numpy(float)
            ratio = statistics.median_ratio(np.maximum(form, 0), kl, 0.0, prompt)
            found[name] = {"bins": calibration(form, kl), "predicted_over_exact": ratio}
    for name in ("direct", "gradient", "integrated"):
        if name in asked:
            score, drop = own[name].to_numpy(float), own.top1_drop.to_numpy(float)
            found[name] = {
                "bins": calibration(score, drop),
                "pearson": statistics.correlation(score, drop, prompt),
                "same_sign": statistics.share(np.sign(score) == np.sign(drop), prompt),
            }
    return found


def summary_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each SAE and score."""
    rows = []
    for g in groups:
        for name, found in g["scores"].items():
            row: dict[str, Any] = {"sae": g["sae"], "layer": g["layer"], "score": name}
            rows.append(with_ends(row | found | {"rows": g["scored_rows"], "tokens": g["scored_tokens"]}))
    return pd.DataFrame(rows)


NOTE = (
    f"ρ: Spearman's with KL among a token's latents; recall: of its {FIRST} largest effects among its {FIRST} largest scores (tokens with {2 * FIRST} "
    f"active latents or more); captured:\nKL of the {FIRST} best by score over that of the {FIRST} best by effect, mean over tokens; missed: rows with KL in the top tenth whose score is below the median. "
    "Brackets: 95 % intervals\nover prompts. All scores on the same tokens, those drawn for paths; exact second order costs more than the effect itself. Draws: next\ntokens y ~ p of the sampled Fisher form; ∞: exact second order. Floor: 99th percentile of KL of identity edits, nats."
)


def effects_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each SAE: rows, median KL beside its placebo's, doses, the noise floor."""
    lines = [
        {
            "SAE": g["sae"], "block": g["layer"], "rows": f"{g['rows']:,}",
            "median ÷ placebo": "" if g["kl_over_placebo"] is None else g["kl_over_placebo"], "median KL": g["kl"],
            "dose": f"{g['relative_dose']:.2g}", "top-1 changed": g["top1_changed"], "median direct": g["kl_direct"], "mean KL": g["mean_kl"],
            "tokens": f"{g['tokens']:,}", "latents": g["latents"], "largest 1 %": f"{g['share_of_largest_hundredth']:.0%} of KL",
            "floor": f"{g['noise_floor']:.0e}", "rows below": f"{g['share_below_floor']:.2%}",
        }
        for g in groups
    ]  # fmt: skip
    return pd.DataFrame(lines)


def scores_frame(groups: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each SAE and score: how well it finds the latents of large effect."""
    lines = [
        {
            "SAE": g["sae"], "block": g["layer"], "score": name, "ρ": s["rank"], "recall": s["recall"],
            "chance": f"{g['chance_recall']:.2f}", "captured": s["captured"], "missed": s["false_negatives"],
        }
        for g in groups for name, s in g["scores"].items()
    ]  # fmt: skip
    return pd.DataFrame(lines)


def first_numbers(groups: list[dict[str, Any]]) -> Iterator[Headline]:
    """For each SAE the ratio to its placebo, the rank correlation of doses beside that of the best other cheap score, and that of exact
    second order."""
    for g in groups:
        where = f"{g['sae']}, block {g['layer']}"
        if g["kl_over_placebo"] is not None:
            words = f"KL of removing one latent ÷ placebo, {where}"
            yield Headline(words, str(g["kl_over_placebo"]), f"1: no more than its dose; median KL {g['kl']} nats")
        others = {name: score["rank"] for name, score in g["scores"].items() if name not in NOT_CHEAP}
        if others and "delta_norm" in g["scores"]:
            name, best = max(others.items(), key=lambda item: item[1].value)
            words = f"rank correlation of a latent's dose ‖z·d‖ with its KL, {where}"
            rank = g["scores"]["delta_norm"]["rank"]
            yield Headline(words, str(rank), f"0: chance; the best other cheap score ({name}): {best}")
        if g.get("draws"):
            yield draws_headline(g, where)
