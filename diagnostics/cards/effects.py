"""Effects of removing a latent at single tokens, beside matched controls (placebos)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from diagnostics import statistics
from diagnostics.cards.corpus import LatentCorpus
from diagnostics.running.notes import how_measured, noted
from diagnostics.sampling.tokens import generator
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.tables import few_prompts
from interventions.edits import matched_placebo
from interventions.effects import Effects, measure

METRICS = ("kl", "kl_direct", "top1_changed", "top1", "clean_top1")
PLACEBOS = 4
"""drawn for each token: effects of random directions differ by factors of ten"""
SELF = 16
"""tokens that also get an identity edit, for the noise floor"""


@dataclass(frozen=True)
class EffectSummary:
    """Effects of a latent; KLs in nats, with 95 % intervals over prompts."""

    kl: Estimate
    """median KL(clean ‖ z·d subtracted)"""
    kl_placebo: Estimate
    """median over the rows with placebos, each placebo counted"""
    placebo_ratio: Estimate
    """median over these rows and their placebos of KL / KL of the placebo; a lower bound where the placebo lies within the noise floor. It is no
    selectivity, intended/(intended + collateral): an intended effect needs a concept, as in feature ablation"""
    kl_direct: Estimate
    """median direct KL: the change goes to the final norm and unembedding without the later blocks"""
    top1_changed: Estimate
    """share of tokens whose most likely next token changes"""
    dose: Estimate
    """mean ‖Δx‖/‖x‖"""
    top_tenth: Estimate
    """share of the summed KL in the tenth of the rows with the largest |z|"""
    top_tenth_dose: float
    """share of the summed ‖Δx‖² in them"""
    noise_floor: float
    """99th percentile of |KL| of identity edits, nats; nan without any"""
    source: str
    """`atlas` (its rows at usable tokens of the joined prompts) or `measured` (usable tokens where the latent is active, drawn uniformly);
    in both cases without the prompts that chose the latent, see `CardContent.chosen_by`"""


def measured(
    corpus: LatentCorpus, latent: int, token: Int[ndarray, "row"], path: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Subtract z·d at single tokens, and placebos of the same norm and angle to x; a line for each token, and notes.

        x − z·d    beside    matched_placebo(x, x − z·d, towards),   towards: the difference of two other tokens' activations

    Columns: token, z, norm = ‖x‖, delta_norm = ‖z·d‖ (the placebos' too), kl, kl_direct, top1_changed, top1, clean_top1, kl_placebo (mean
    over four placebos; nan where there is none), kl_placebo_0 … 3 (of each), kl_self (identity edit of the first 16; else nan). KLs in nats.
    """  # fmt: skip
    dictionary, clean = corpus.dictionary, corpus.clean
    z = corpus.of(latent)[token]
    x = corpus.x(token)
    wide = torch.promote_types(x.dtype, torch.float32)
    direction = dictionary.directions[latent].to(x.device, wide)
    edited = x.to(wide) - torch.from_numpy(z).to(x.device, wide)[:, None] * direction
    stream = generator(corpus.seed, "latent card placebo", str(dictionary.site), latent)
    n, every = len(token), np.arange(len(token))
    towards = torch.cat([clean.between(dictionary.site, n, stream, every) for _ in range(PLACEBOS)])
    placebo = matched_placebo(x.to(wide).repeat(PLACEBOS, 1), edited.repeat(PLACEBOS, 1), towards)
    there = placebo.isfinite().all(dim=-1).cpu().numpy()
    placebo_kl = np.full(PLACEBOS * n, np.nan)
    frame = pd.DataFrame(
        {
            "token": token,
            "z": z,
            "norm": corpus.norm[token],
            "delta_norm": (edited - x.to(wide)).norm(dim=-1).double().cpu().numpy(),
        }
    )
    for name in (*METRICS, "kl_self"):
        frame[name] = np.nan
    ran: dict[str, Any] = {}
    nonfinite = 0
    for shard, prompts in enumerate(clean.shards):
        own = np.flatnonzero(np.isin(corpus.prompt[token], prompts))
        if not len(own):
            continue
        also = (own + n * np.arange(PLACEBOS)[:, None]).reshape(-1)
        also = also[there[also]]
        again = own[own < SELF]
        rows = np.concatenate([own, also % n, again])
        vectors = torch.cat([edited[own], placebo[also], x.to(wide)[again]])
        found = _measure(corpus, shard, token[rows], vectors, path)
        for name in METRICS:
            frame.loc[own, name] = found[name][: len(own)].double().numpy()
        kl = found["kl"].double().numpy()
        placebo_kl[also] = kl[len(own) : len(own) + len(also)]
        frame.loc[again, "kl_self"] = kl[len(own) + len(also) :]
        noted(ran, found)
        nonfinite += found.n_nonfinite
    known, total = there.reshape(PLACEBOS, n).sum(0), np.nansum(placebo_kl.reshape(PLACEBOS, n), axis=0)
    frame["kl_placebo"] = np.divide(total, known, out=np.full(n, np.nan), where=known > 0)
    for i, kl in enumerate(placebo_kl.reshape(PLACEBOS, n)):
        frame[f"kl_placebo_{i}"] = kl
    how = how_measured([("", ran)])
    notes = {
        "placebos": PLACEBOS,
        **how,
        "path": how["path"].get("", ""),
        "effects_not_finite": nonfinite,
        "placebos_that_do_not_exist": int((~there).sum()),
    }
    return frame, notes


def _measure(corpus: LatentCorpus, shard: int, token: ndarray, vectors: Tensor, path: str) -> Effects:
    first = int(corpus.clean.shards[shard][0])
    prompt, position = (torch.from_numpy(at[token]).long() for at in (corpus.prompt, corpus.position))
    recording = corpus.clean.recording(shard)
    how: dict[str, Any] = {"metrics": METRICS, "path": path, "nonfinite": "count"}
    return measure(recording, corpus.dictionary.site, prompt - first, position, vectors, **how)


def summarised(rows: pd.DataFrame, placebos: pd.DataFrame, prompt: Int[ndarray, "token"], source: str) -> EffectSummary:
    """Statistics of rows (token, z, norm, delta_norm, kl, kl_direct, top1_changed) and of those with placebos.

    prompt: of each token of the corpus. Rows with values that are not finite are left out.
    """
    rows = rows.loc[np.isfinite(rows[["kl", "kl_direct"]].to_numpy(float)).all(axis=1)]
    each = [name for name in placebos if str(name).startswith("kl_placebo_")] or ["kl_placebo"]
    pairs = placebos.melt(["token", "kl"], each, value_name="kl_of_placebo")
    pairs = pairs.loc[np.isfinite(pairs[["kl", "kl_of_placebo"]].to_numpy(float)).all(axis=1)]
    own, paired = prompt[rows.token.to_numpy(int)], prompt[pairs.token.to_numpy(int)]
    kl, z, delta = (rows[name].to_numpy(float) for name in ("kl", "z", "delta_norm"))
    selves = placebos.kl_self.dropna().to_numpy(float)
    floor = statistics.noise_floor(selves) if len(selves) else float("nan")
    with few_prompts():
        return EffectSummary(
            statistics.median(kl, own),
            statistics.median(pairs.kl_of_placebo.to_numpy(float), paired),
            statistics.median_ratio(
                pairs.kl.to_numpy(float), pairs.kl_of_placebo.to_numpy(float), np.nan_to_num(floor), paired
            ),
            statistics.median(rows.kl_direct.to_numpy(float), own),
            statistics.share(rows.top1_changed.to_numpy(float) > 0, own),
            statistics.mean(delta / rows.norm.to_numpy(float), own),
            statistics.jackknife(lambda keep: share_of_top(kl[keep], z[keep]), len(kl), own),
            share_of_top(delta**2, z),
            floor,
            source,
        )


def share_of_top(mass: Float[ndarray, "row"], z: Float[ndarray, "row"], share: float = 0.1) -> float:
    """Share of the summed mass in the ⌈share·n⌉ rows with the largest |z|; nan without any mass."""
    if not len(z) or mass.sum() <= 0:
        return float("nan")
    top = np.argsort(-np.abs(z), kind="stable")[: int(np.ceil(share * len(z)))]
    return float(mass[top].sum() / mass.sum())


def firing_shares(
    active: Bool[ndarray, "token"], quartile: Int[ndarray, "token"], prompt: Int[ndarray, "token"]
) -> tuple[Estimate, ...]:
    """Share of a latent's active tokens in each quartile 0 to 3, with jackknife intervals."""
    with few_prompts():
        return tuple(statistics.share(quartile[active] == q, prompt[active]) for q in range(4))
