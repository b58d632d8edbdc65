"""Which latents are measured, and at which tokens of each: strata and their weights, by seeded hash."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt64
from numpy import ndarray

from diagnostics.sampling.tokens import hash_keys
from interventions.errors import ResultError

SAMPLINGS = ("stratified", "active")
"""`stratified`: latents in equal numbers from bins of log frequency; tokens of each in equal numbers from strata of ‖x‖ × |cos| over
all tokens. `active`: the most frequent latents, each at tokens where it is active, as published: selecting on the SAE's own score
is a choice that the result depends on."""
FREQUENCY_BINS = 5
COSINE_BANDS = (0.0, 0.5, 0.75, 0.9, 0.97, 1.0)
"""Quantiles of |cos(x, d̂)| between which a latent's tokens are drawn: narrow at the top, where it is active."""
MIN_ACTIVE = 40
"""Active tokens below which `active` leaves a latent out. Source: arXiv:2606.15054."""
BIPOLAR_SHARE = 0.1
"""Least share of a latent's firing that each sign of a bipolar latent takes. Source: ours, for the census of arXiv:2605.28149."""


def is_bipolar(fired: Num[ndarray, "latent"], positive: Num[ndarray, "latent"]) -> Bool[ndarray, "latent"]:
    """Whether each sign takes at least `BIPOLAR_SHARE` of a latent's firing. fired, positive: tokens with z ≠ 0, and with z > 0."""
    return (fired > 0) & (np.minimum(positive, fired - positive) >= BIPOLAR_SHARE * fired)


@dataclass(frozen=True)
class Drawn:
    """Some of several things, and how many each stands for."""

    index: Int[ndarray, "drawn"]
    """ascending"""
    weight: Float[ndarray, "drawn"]


def shares(
    size: Int[ndarray, "stratum"], n: int, order: UInt64[ndarray, "stratum"] | None = None
) -> Int[ndarray, "stratum"]:
    """How many of `n` come from each stratum: equal numbers, what a small one lacks spread over the others, what is left over one
    each in ascending `order`."""
    n = min(n, int(size.sum()))
    level = next((k for k in range(int(size.max(initial=0)), 0, -1) if np.minimum(size, k).sum() <= n), 0)
    taken = np.minimum(size, level)
    more = np.flatnonzero(size > level)
    more = more if order is None else more[np.argsort(order[more], kind="stable")]
    taken[more[: n - int(taken.sum())]] += 1
    return taken


def from_strata(stratum: Int[ndarray, "item"], key: UInt64[ndarray, "item"], n: int) -> Drawn:
    """`n` items in equal numbers from strata (negative: not to be drawn), those of the smallest keys; weight: stratum's size over
    how many of it are drawn. Where n is small some strata get none and nobody stands for them: weights add up to less."""
    there = np.flatnonzero(stratum >= 0)
    order = there[np.lexsort((key[there], stratum[there]))]
    names, first, size = np.unique(stratum[order], return_index=True, return_counts=True)
    taken = shares(size, n, key[order[first]])  # the smallest key of each stratum
    place = np.arange(len(order)) - np.repeat(first, size)
    chosen = place < np.repeat(taken, size)
    index, weight = order[chosen], np.repeat(size / np.maximum(taken, 1), size)[chosen]
    sort = np.argsort(index)
    assert len(names) == len(taken)
    return Drawn(index[sort], weight[sort])


def frequency_bins(frequency: Float[ndarray, "latent"]) -> tuple[Int[ndarray, "latent"], Float[ndarray, "edge"]]:
    """The bin of each latent, equally wide in log frequency between the rarest and the most frequent (−1: it never fires)."""
    live = frequency > 0
    if not live.any():
        return np.full(len(frequency), -1), np.zeros(0)
    edges = np.geomspace(frequency[live].min(), frequency[live].max(), FREQUENCY_BINS + 1)
    inside = np.searchsorted(edges[1:-1], frequency, side="right")
    return np.where(live, inside, -1), edges


def draw_latents(
    frequency: Float[ndarray, "latent"], n_tokens: int, asked: int, sampling: str, seed: int, label: str
) -> tuple[Drawn, dict[str, Any]]:
    """Latents by their frequency (share of `n_tokens` usable tokens on which each fires), and what is to be said of the draw.

    Raises `ResultError` when none is left.
    """
    live = int((frequency > 0).sum())
    said: dict[str, Any] = {"latents": len(frequency), "never fire": len(frequency) - live}
    number = np.arange(len(frequency))
    if sampling == "active":
        often = np.flatnonzero(frequency * n_tokens >= MIN_ACTIVE - 0.5)
        best = np.sort(often[np.lexsort((often, -frequency[often]))][:asked])
        drawn = Drawn(best, np.ones(len(best)))
        said |= {f"on fewer than {MIN_ACTIVE} tokens": live - len(often)}
    else:
        bins, edges = frequency_bins(frequency)
        drawn = from_strata(bins, hash_keys(seed, f"latents/{label}", number), asked)
        said |= {
            "frequency edges": edges.tolist(),
            "bin sizes": np.bincount(bins[bins >= 0], minlength=FREQUENCY_BINS).tolist(),
            "drawn of each": np.bincount(bins[drawn.index], minlength=FREQUENCY_BINS).tolist(),
        }
    if not len(drawn.index):
        raise ResultError(f"no latent to ask about ({label}): {said}; give more text, or another sampling")
    return drawn, said | {"drawn": len(drawn.index)}


def draw_tokens(
    quartile: Int[ndarray, "token"], cosine: Float[ndarray, "token"], key: UInt64[ndarray, "token"], asked: int
) -> Drawn:
    """Tokens of one latent, in equal numbers from quartiles of ‖x‖ × bands of |cos| over all tokens."""
    size = np.abs(cosine)
    edges = np.quantile(size, COSINE_BANDS[1:-1])
    return from_strata(quartile * len(COSINE_BANDS) + np.searchsorted(edges, size, side="right"), key, asked)


def draw_active(active: ndarray, key: UInt64[ndarray, "token"], asked: int) -> Drawn:
    """Tokens of one latent among those where it is active."""
    return from_strata(np.where(active, 0, -1), key, asked)
