"""Statistics of judged latents: detection scores with intervals, and their correlation with alignment."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats

from diagnostics.auto_interpretation.judges import THRESHOLD
from diagnostics.auto_interpretation.work import OF
from diagnostics.results.headlines import Group, Headline
from diagnostics.statistics.jackknife import jackknife
from diagnostics.statistics.measures import correlation
from diagnostics.statistics.over_latents import mean_over_latents
from diagnostics.statistics.tables import each, lines_of

MEASURES = ("auc", "balanced_accuracy")
ALIGNMENTS = ("alignment", "alignment_cosine")
NOTE = (
    "Detection on held-out snippets, as many active as not; chance .5. auc: an active snippet scored above another (ties: half); balanced "
    f"accuracy: scores of {THRESHOLD:g} or more count as active. shuffled: the explanation of another latent. Means over latents, weighted by how many "
    "each stands for; intervals: 95 %, over prompts and over the latents drawn. Correlations: over the latents drawn, unweighted, with "
    "a jackknife over latents; the token-frequency judge sees single tokens and is no language model."
)


def detection(score: Float[ndarray, "snippet"], active: Bool[ndarray, "snippet"]) -> tuple[float, float]:
    """AUC and balanced accuracy; nan without snippets of both classes.

    AUC = (Σ ranks of active − n₁(n₁ + 1)/2) / (n₁ n₀), ties at mid-ranks (Mann-Whitney).
    """
    n1, n0 = int(active.sum()), int((~active).sum())
    if not n1 or not n0:
        return np.nan, np.nan
    auc = (stats.rankdata(score)[active].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)
    said = score >= THRESHOLD
    return float(auc), float((said[active].mean() + (~said[~active]).mean()) / 2)


def latents_frame(snippets: pd.DataFrame, about: pd.DataFrame) -> pd.DataFrame:
    """A line for each latent × judge × explanation: detection scores and numbers of snippets."""
    lines = []
    for (sae, latent, polarity, judge, of), some in each(snippets, ["sae", "latent", "polarity", "judge", "of"]):
        active = some["active"].to_numpy(bool)
        auc, accuracy = detection(some["score"].to_numpy(float), active)
        line = {
            "sae": sae,
            "latent": latent,
            "polarity": polarity,
            "judge": judge,
            "of": of,
            "auc": auc,
            "balanced_accuracy": accuracy,
        }
        lines.append(line | {"active": int(active.sum()), "inactive": int((~active).sum())})
    keys = ["sae", "latent", "polarity"]
    found = pd.DataFrame(lines).merge(about, on=keys, how="left", validate="many_to_one")
    first = [
        "sae",
        "layer",
        "point",
        *keys[1:],
        "bin",
        "weight",
        "frequency",
        "alignment",
        "alignment_cosine",
        "shuffled_with",
    ]
    return found.reindex(columns=[*first, "judge", "of", *MEASURES, "active", "inactive"])


def groups_of(frame: pd.DataFrame, snippets: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A line for each SAE and judge: scores with the own explanation, with another latent's, and their difference."""
    for (sae, layer, point, judge), some in each(frame, ["sae", "layer", "point", "judge"]):
        rows = lines_of(snippets, sae=sae, judge=judge)
        prompts = np.unique(rows["prompt"])
        values, without = {}, {}
        for of in OF:
            own = lines_of(some, of=of)
            values[of] = own[list(MEASURES)].to_numpy(float)
            without[of] = np.repeat(values[of][None], len(prompts), axis=0)
            here = {key: part for key, part in each(lines_of(rows, of=of), ["latent", "polarity"])}
            for i, key in enumerate(zip(own["latent"], own["polarity"], strict=True)):
                score, active, prompt = (here[key][name].to_numpy() for name in ("score", "active", "prompt"))
                for p in np.unique(prompt):
                    keep = prompt != p
                    without[of][np.searchsorted(prompts, p), i] = detection(
                        score[keep].astype(float), active[keep].astype(bool)
                    )
        own = lines_of(some, of="own")
        how = own["weight"].to_numpy(float), own["bin"].to_numpy(int)
        line: dict[str, Any] = {
            "sae": sae, "layer": int(layer), "point": point, "judge": judge, "latents": len(own),
            "snippets": int(own[["active", "inactive"]].to_numpy().sum()),
        }  # fmt: skip
        for j, name in enumerate(MEASURES):
            for of in OF:
                line[name if of == "own" else f"{name}_shuffled"] = mean_over_latents(
                    values[of][:, j], without[of][:, :, j], *how
                )
            value, left = (part["own"][..., j] - part["shuffled"][..., j] for part in (values, without))
            line[f"{name}_above_shuffled"] = mean_over_latents(value, left, *how, (-1.0, 1.0))
        yield line | correlations(own)


def correlations(own: pd.DataFrame) -> dict[str, Any]:
    """Spearman's correlation of alignment, and of the cosine of w and d, with AUC over latents, and the same given the latents' frequency.

        r(x, y | f) = (r_xy − r_xf r_yf) / √((1 − r_xf²)(1 − r_yf²))

    nan where one of the two is constant. Jackknife over latents.
    """
    found: dict[str, Any] = {}
    for column in ALIGNMENTS:
        x = np.round(own[column].to_numpy(float), 6)  # unit rows: a constant with rounding is constant
        y, frequency = own["auc"].to_numpy(float), own["frequency"].to_numpy(float)
        known = np.isfinite(x) & np.isfinite(y)
        rows = np.stack([x, y, frequency])[:, known]
        n, latent = int(known.sum()), np.arange(int(known.sum()))
        found[f"{column}_sd"] = float(np.std(rows[0])) if n else np.nan
        found[f"r_{column}"] = correlation(rows[0], rows[1], latent, "spearman")
        found[f"r_{column}_given_frequency"] = jackknife(
            lambda keep, rows=rows: _partial(rows[:, keep]), n, latent, correct_pairs=False
        )
    return found


def _partial(rows: Float[ndarray, "three latent"]) -> float:
    """The rank correlation of the first two rows given the third."""
    with np.errstate(all="ignore"):
        r = np.corrcoef(stats.rankdata(rows, axis=1))
        return float((r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)))


def headlines(groups: Sequence[Group]) -> Iterator[Headline]:
    """AUC beside the shuffled explanations."""
    for g in groups:
        what = f"detection AUC, {g['sae']}, judge {g['judge']}, {g['latents']} latents"
        yield Headline(what, str(g["auc"]), f"explanation of another latent: {g['auc_shuffled']}; chance .5")


def short_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """Scores by SAE and judge."""
    columns = [name + end for name in MEASURES for end in ("", "_shuffled", "_above_shuffled")]
    return pd.DataFrame(
        {"sae": g["sae"], "judge": g["judge"], "latents": g["latents"]}
        | {name.replace("_", " "): str(g[name]) for name in columns}
        for g in groups
    )  # fmt: skip


def alignment_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """Correlations of alignment with AUC."""
    return pd.DataFrame(
        {"sae": g["sae"], "judge": g["judge"], "latents": g["latents"]}
        | {f"r({name}, auc)": str(g[f"r_{name}"]) for name in ALIGNMENTS}
        | {f"r({name}, auc | frequency)": str(g[f"r_{name}_given_frequency"]) for name in ALIGNMENTS}
        | {f"SD of {name}": g[f"{name}_sd"] for name in ALIGNMENTS}
        for g in groups
    )  # fmt: skip


def left_out(provenance: Mapping[str, Any]) -> list[str]:
    """Latents that are not judged; a line each."""
    said = []
    for sae, drawn in provenance["drawn"].items():
        skipped = [
            f"{n:,} {reason}" for reason, n in drawn.items() if reason.startswith("active at") or reason == "never fire"
        ]
        line = f"{sae}: {drawn['drawn']} of {drawn['eligible']:,} latents drawn, of {drawn['latents']:,}; {', '.join(skipped)}"
        unmatched = drawn["unmatched"]
        said.append(
            line
            + (
                f"; {unmatched} with inactive snippets about any token, for too few lie about latents of like density"
                if unmatched
                else ""
            )
        )
    return said
