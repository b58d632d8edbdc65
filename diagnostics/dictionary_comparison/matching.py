"""Matching of latents between two dictionaries by decoder rows and activations.

Pure functions of decoder rows and sparse activations. Latents may have either sign: (−z, −d) is the same latent as (z, d).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

from diagnostics.dictionary_comparison.activity import (
    Activity,
    blocks,
    chosen_pairs,
    correlations,
    cosines,
    joined,
    usable,
)
from interventions.errors import ResultError

HUNGARIAN_LIMIT = 8192
"""Largest number of latents on a side of a component for which the matching is optimal."""


@dataclass(frozen=True, eq=False)
class Partners:
    """For each latent of one dictionary its partners in another. Similarity of two latents: correlation × cosine, the correlation of
    z_i·d̂_i and z_j·d̂_j; a latent that is constant on these tokens has none."""

    partner: Int[ndarray, "latent"]
    """the most similar latent (−1: none has positive similarity)"""
    correlation: Float[ndarray, "latent"]
    """of the activations of the two; nan without a partner"""
    cosine: Float[ndarray, "latent"]
    """of their decoder rows; nan without a partner"""
    agrees: Bool[ndarray, "latent"]
    """whether any latent meets both thresholds"""
    match: Int[ndarray, "latent"]
    """its one-to-one match among those (−1: none)"""
    mcs: Float[ndarray, "latent"]
    """largest cosine (|cosine| for signed latents) with a decoder row of the other dictionary, active or not"""
    stable: Bool[ndarray, "latent"]
    """whether it has a one-to-one match by decoder rows alone: cosine above the threshold"""

    def classes(self, usable: Bool[ndarray, "latent"]) -> dict[str, Bool[ndarray, "latent"]]:
        """Usable latents as `matched`, `shared` (agrees only with latents matched to others) or `unique`."""
        matched = self.match >= 0
        return {
            "matched": usable & matched,
            "shared": usable & ~matched & self.agrees,
            "unique": usable & ~matched & ~self.agrees,
        }


@dataclass(frozen=True, eq=False)
class Matching:
    """Two dictionaries on the same tokens."""

    a: Partners
    b: Partners
    method: str
    """`hungarian` (the optimal one-to-one matching), or `hungarian, greedy in …` where components were too large"""


def matched(
    a: Activity,
    b: Activity,
    *,
    correlation: float = 0.7,
    cosine: float = 0.7,
    min_active: int = 10,
    limit: int = HUNGARIAN_LIMIT,
) -> Matching:
    """Match two dictionaries' latents one to one.

    Two latents agree where |correlation| ≥ its threshold, |cosine| > its threshold, and both have the same sign. Pairs that agree
    form components without common latents; within each the matching has the largest sum of similarities (Hungarian algorithm), or,
    with more than `limit` latents on a side, is greedy by mutual best. Thresholds: arXiv:2606.15054; one-to-one matching is ours.
    Raises `ResultError` for thresholds outside (0, 1].
    """
    if not (0 < correlation <= 1 and 0 < cosine <= 1):
        raise ResultError(
            f"thresholds {correlation} (correlation), {cosine} (cosine); expected numbers above 0, up to 1"
        )
    signed = a.signed or b.signed
    able = usable(a, min_active), usable(b, min_active)
    best = _Best(len(a.fired)), _Best(len(b.fired))
    mcs = np.full(len(a.fired), -np.inf), np.full(len(b.fired), -np.inf)
    agreeing, near = [], []
    for some in blocks(len(a.fired), len(b.fired)):
        cos, r = cosines(a, b, some), correlations(a, b, some)
        similar = np.where(able[0][some, None] & able[1], r * cos, 0.0)
        best[0].rows(some, similar, r, cos)
        best[1].columns(some, similar, r, cos)
        size = np.abs(cos) if signed else cos
        mcs[0][some], mcs[1][:] = size.max(axis=1), np.maximum(mcs[1], size.max(axis=0))
        agreeing.append(
            chosen_pairs(some, (similar > 0) & (np.abs(r) >= correlation) & (np.abs(cos) > cosine), similar)
        )
        near.append(chosen_pairs(some, size > cosine, size))
    shape = len(a.fired), len(b.fired)
    i, j, method = one_to_one(*joined(agreeing), shape, limit)
    stable_i, stable_j, stable_method = one_to_one(*joined(near), shape, limit)
    said = method if method == stable_method else f"{method}; by decoder rows {stable_method}"
    agree = joined(agreeing)[:2]
    sides = []
    for side, (own, other, stable) in enumerate(((i, j, stable_i), (j, i, stable_j))):
        match = np.full(shape[side], -1)
        match[own] = other
        found = best[side]
        agrees, own_row = _marked(agree[side], shape[side]), _marked(stable, shape[side])
        sides.append(Partners(found.partner, found.correlation, found.cosine, agrees, match, mcs[side], own_row))
    return Matching(sides[0], sides[1], said)


def _marked(index: ndarray, n: int) -> Bool[ndarray, "latent"]:
    found = np.zeros(n, dtype=bool)
    found[index] = True
    return found


class _Best:
    """The most similar latent of another dictionary, block by block."""

    def __init__(self, n: int):
        self.similar = np.zeros(n)
        self.partner = np.full(n, -1)
        self.correlation, self.cosine = np.full(n, np.nan), np.full(n, np.nan)

    def rows(self, some: slice, similar: ndarray, r: ndarray, cos: ndarray) -> None:
        row, best = np.arange(len(similar)), similar.argmax(axis=1)
        self._take(row + some.start, best, similar[row, best], r[row, best], cos[row, best])

    def columns(self, some: slice, similar: ndarray, r: ndarray, cos: ndarray) -> None:
        column, best = np.arange(similar.shape[1]), similar.argmax(axis=0)
        self._take(column, best + some.start, similar[best, column], r[best, column], cos[best, column])

    def _take(self, own: ndarray, other: ndarray, similar: ndarray, r: ndarray, cos: ndarray) -> None:
        better = similar > self.similar[own]
        for kept, new in ((self.similar, similar), (self.partner, other), (self.correlation, r), (self.cosine, cos)):
            kept[own[better]] = new[better]


def one_to_one(
    i: Int[ndarray, "pair"],
    j: Int[ndarray, "pair"],
    weight: Float[ndarray, "pair"],
    shape: tuple[int, int],
    limit: int = HUNGARIAN_LIMIT,
) -> tuple[Int[ndarray, "chosen"], Int[ndarray, "chosen"], str]:
    """A one-to-one matching among pairs (i, j) of positive weight, in ascending order of i, and the method.

    The largest sum of weights, component by component (Hungarian); mutual best first in components of more than `limit` on a side.
    """
    graph = sparse.coo_matrix((np.ones(len(i)), (i, j + shape[0])), shape=(sum(shape),) * 2)
    component = connected_components(graph, directed=False)[1][i] if len(i) else np.zeros(0, dtype=int)
    order = np.argsort(component, kind="stable")
    chosen, large = [], []
    for part in np.split(order, np.flatnonzero(np.diff(component[order])) + 1) if len(i) else []:
        rows, row = np.unique(i[part], return_inverse=True)
        columns, column = np.unique(j[part], return_inverse=True)
        if max(len(rows), len(columns)) > limit:
            large.append(len(rows))
            chosen.append(part[_greedy(row, column, weight[part])])
            continue
        place = np.full((len(rows), len(columns)), -1)
        place[row, column] = part
        value = np.where(place >= 0, weight[place], 0.0)
        found = place[linear_sum_assignment(value, maximize=True)]
        chosen.append(found[found >= 0])
    some = np.concatenate(chosen) if chosen else np.zeros(0, dtype=int)
    some = some[np.argsort(i[some])]
    said = f", greedy in {len(large)} components of up to {max(large)} latents" if large else ""
    return i[some], j[some], f"hungarian{said}"


def _greedy(row: ndarray, column: ndarray, weight: ndarray) -> Int[ndarray, "chosen"]:
    """Greedy matching: the heaviest pair of two free latents, again and again."""
    taken_row, taken_column, chosen = set(), set(), []
    for pair in np.lexsort((column, row, -weight)):
        if row[pair] not in taken_row and column[pair] not in taken_column:
            taken_row.add(row[pair])
            taken_column.add(column[pair])
            chosen.append(pair)
    return np.array(chosen, dtype=int)
