"""The probing gap between two dictionaries, split into latents that one lacks and better separation by shared latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats
from sklearn.linear_model import LogisticRegression

from diagnostics.sampling.tokens import hash_keys
from diagnostics.statistics.estimate import Estimate, FiellerInterval
from diagnostics.statistics.jackknife import covariance_from_deletions, from_deletions, sums_without
from diagnostics.statistics.measures import fieller_from
from interventions.errors import ResultError
from interventions.files import jsonable
from interventions.texts.groups import first_of_group

CONDITIONS = ("a", "b", "a_matched", "b_matched")
"""Latents that a probe may use: all of A, all of B, those of A with a match in B, those of B with a match in A."""
C = 1.0
"""Inverse strength of the probes' L2 penalty, on standardised latents."""


@dataclass(frozen=True)
class DiscoverySplit:
    """The probing gap between two dictionaries in two parts."""

    accuracy: dict[str, Estimate]
    """balanced held-out accuracy for each of `CONDITIONS`, mean over tasks"""
    gap: Estimate
    """accuracy of B − accuracy of A, each with all latents"""
    separability: Estimate
    """the same with matched latents alone"""
    discovery: Estimate
    """gap − separability: what latents without a match add"""
    share: FiellerInterval
    """discovery ÷ gap"""
    n_texts: int
    n_groups: int
    """groups of texts, which are held out whole; each text its own where none are given"""
    n_tasks: int
    """one class against the rest; with two classes one"""

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        parts = {name: getattr(self, name) for name in ("gap", "separability", "discovery", "share")}
        accuracy = {f"accuracy_{name}": found for name, found in self.accuracy.items()}
        return jsonable(accuracy | parts | {"texts": self.n_texts, "groups": self.n_groups, "tasks": self.n_tasks})


def discovery_split(
    latents_a: Float[ndarray, "text a"],
    latents_b: Float[ndarray, "text b"],
    matched_pairs: Int[ndarray, "pair 2"],
    labels: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    k: int = 1,
    folds: int = 5,
    seed: int = 0,
) -> DiscoverySplit:
    """Split the gap in sparse probing between two dictionaries into discovery and separability.

        gap = acc(B) − acc(A),   separability = acc(B, matched) − acc(A, matched),   discovery = gap − separability

    latents: mean over each text's tokens. matched_pairs: (latent of A, latent of B), one to one. Each class is probed against the rest
    by a logistic regression on the `k` latents whose class means differ most (|difference|, on the texts fitted on; C = 1 on standardised
    latents, classes weighted equally). groups: of each text (None: each its own).
    Every text is held out once, with its group, by folds stratified by class. Intervals: delete-one-group jackknife of the held-out
    answers; probes and matches are held fixed. Source: arXiv:2606.15054 (the split, k = 1); folds, intervals, the ratio's Fieller
    interval are ours. Raises `ResultError` for arrays that do not fit, a class with fewer groups than folds, and no matched pair.
    """
    names = np.asarray(labels, dtype=str)
    sides = {"a": np.asarray(latents_a, dtype=float), "b": np.asarray(latents_b, dtype=float)}
    pairs = np.asarray(matched_pairs)
    if any(x.ndim != 2 or len(x) != len(names) for x in sides.values()) or pairs.ndim != 2 or not len(pairs):
        shapes = [list(x.shape) for x in (*sides.values(), pairs)]
        raise ResultError(
            f"latents and pairs of shapes {shapes} for {len(names)} labels; expected [text, latent] twice, [pair, 2]"
        )
    if groups is not None and len(groups) != len(names):
        raise ResultError(f"{len(groups)} groups for {len(names)} labels; expected one a text")
    group = first_of_group(range(len(names)) if groups is None else groups)
    classes = np.unique(names)
    fewest = min((len(np.unique(group[names == name])) for name in classes), default=0)
    if len(classes) < 2 or fewest < folds or folds < 2 or k < 1:
        raise ResultError(
            f"{len(classes)} classes of at least {fewest} texts (or groups of texts), {folds} folds, k = {k}; expected two classes "
            "or more, 2 folds or more, k of 1 or more, and as many texts, or groups, of each class as folds"
        )
    sides |= {"a_matched": sides["a"][:, pairs[:, 0]], "b_matched": sides["b"][:, pairs[:, 1]]}
    fold = _folds(names, group, folds, seed)
    tasks = [names == name for name in (classes if len(classes) > 2 else classes[:1])]
    right = {name: _held_out(x, tasks, fold, k) for name, x in sides.items()}
    deleted = {name: _accuracies(found, np.array(tasks), group) for name, found in right.items()}
    n, sizes = len(names), np.unique(group, return_counts=True)[1]

    def estimate(*weighted: tuple[str, float]) -> tuple[Estimate, ndarray]:
        found = sum(weight * deleted[name] for name, weight in weighted)
        assert isinstance(found, ndarray)
        return from_deletions(float(found[0]), found[1:], sizes), found

    gap, gap_deleted = estimate(("b", 1), ("a", -1))
    separability, _ = estimate(("b_matched", 1), ("a_matched", -1))
    discovery, rest = estimate(("b", 1), ("a", -1), ("b_matched", -1), ("a_matched", 1))
    covariance, df = covariance_from_deletions(np.column_stack([rest[1:], gap_deleted[1:]]), sizes)
    t = (
        float(stats.t.ppf(0.975, df)) if np.isfinite(df) else 1.0
    )  # without a covariance there is no interval whatever t
    share = fieller_from(
        discovery.value,
        gap.value,
        covariance[0, 0],
        covariance[0, 1],
        covariance[1, 1],
        t,
        n_rows=n,
        n_prompts=len(sizes),
    )
    accuracy = {name: estimate((name, 1))[0] for name in CONDITIONS}
    return DiscoverySplit(accuracy, gap, separability, discovery, share, n, len(sizes), len(tasks))


def _folds(names: ndarray, group: ndarray, folds: int, seed: int) -> Int[ndarray, "text"]:
    """The fold of each text: groups in an order by hash, each into the fold with the fewest texts of its classes."""
    found, key = np.zeros(len(names), dtype=int), hash_keys(seed, "discovery", np.arange(len(names)))
    classes, of = np.unique(names, return_inverse=True)
    size = np.zeros((folds, len(classes)))
    for first in sorted(np.unique(group), key=lambda first: key[first]):
        own = group == first
        counts = np.bincount(of[own], minlength=len(classes))
        fold = int((size @ counts).argmin())
        found[own] = fold
        size[fold] += counts
    return found


def _held_out(x: ndarray, tasks: Sequence[Bool[ndarray, "text"]], fold: ndarray, k: int) -> Bool[ndarray, "task text"]:
    """Whether the probe fitted on the other folds is right, for each task and text."""
    right = np.zeros((len(tasks), len(x)), dtype=bool)
    number = fold.max() + 1
    total = np.array([x[fold == held].sum(axis=0) for held in range(number)])
    for row, task in zip(right, tasks, strict=True):
        inside = np.array([x[task & (fold == held)].sum(axis=0) for held in range(number)])
        for held in range(number):
            fit, test = fold != held, fold == held
            own, n = inside.sum(axis=0) - inside[held], int((fit & task).sum())
            rest = total.sum(axis=0) - total[held] - own
            best = np.argsort(-np.abs(own / n - rest / (int(fit.sum()) - n)), kind="stable")[:k]
            some = x[:, best]
            mean, sd = some[fit].mean(axis=0), some[fit].std(axis=0)
            some = (some - mean) / np.where(sd > 0, sd, 1.0)
            probe = LogisticRegression(C=C, class_weight="balanced").fit(some[fit], task[fit])
            row[test] = probe.predict(some[test]) == task[test]
    return right


def _accuracies(
    right: Bool[ndarray, "task text"], tasks: Bool[ndarray, "task text"], group: Int[ndarray, "text"]
) -> Float[ndarray, "deletion"]:
    """Balanced accuracy, mean over tasks: with all texts, then without each group."""
    value = 0.0
    for side in (tasks, ~tasks):
        hits, size = (part.astype(float) for part in (right & side, side))
        with np.errstate(invalid="ignore"):
            whole = hits.sum(1, keepdims=True) / size.sum(1, keepdims=True)
            without = sums_without(hits, group) / sums_without(size, group)
        value = value + 0.5 * np.concatenate([whole, without], axis=1)
    return np.asarray(value).mean(axis=0)
