"""Slopes and correlations within groups of rows (the tokens of each latent), on all rows and without each prompt.

Everything a jackknife over prompts needs of least squares lies in sums of products. They are formed once for each prompt and
group; leaving a prompt out is then a subtraction, and hundreds of groups × hundreds of deletions cost one pass over the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

from diagnostics import statistics
from diagnostics.statistics.estimate import Estimate, FiellerInterval, Transform, effective_number
from interventions.errors import ResultError

_CONSTANT = 1e-12  # a variance below this share of the column's own is one of 0


class EachGroup(NamedTuple):
    """A statistic of every group with its delete-one-prompt jackknife; all `[group]`."""

    value: Float[ndarray, "group"]
    se: Float[ndarray, "group"]
    """nan below 10 effective prompts, and where a deletion leaves the statistic undefined"""
    df: Float[ndarray, "group"]
    """effective prompts of the group less one"""


@dataclass(frozen=True)
class GroupSums:
    """Centred sums of products of columns within each group. Deletion 0 leaves out nothing, deletion g the g-th prompt."""

    names: tuple[str, ...]
    groups: Int[ndarray, "group"]
    """their labels, ascending"""
    n: Float[ndarray, "deletion group"]
    """rows left (sums of their weights, where there are weights)"""
    products: Float[ndarray, "deletion group k k"]
    """Σ (x − x̄)(y − ȳ), each column in units of its own spread within groups"""
    scale: Float[ndarray, "k"]
    """that spread: root mean square deviation from the group's mean"""
    present: Int[ndarray, "prompt group"]
    """rows of each prompt and group"""
    n_rows: int

    @classmethod
    def of(
        cls,
        columns: Mapping[str, Float[ndarray, "row"]],
        group: Int[ndarray, "row"],
        prompt: Int[ndarray, "row"],
        weight: Float[ndarray, "row"] | None = None,
    ) -> "GroupSums":
        """Columns of finite numbers, the group and the prompt of each row. Raises `ResultError` for rows that do not fit."""
        names, n_rows = tuple(columns), len(group)
        table = np.array([np.asarray(c, dtype=float) for c in columns.values()])
        w = np.ones(n_rows) if weight is None else np.asarray(weight, dtype=float)
        if table.shape != (len(names), n_rows) or len(prompt) != n_rows or len(w) != n_rows or not n_rows:
            raise ResultError(
                f"columns {list(table.shape)}, {n_rows} groups, {len(prompt)} prompts; expected one a row"
            )
        if bad := int((~np.isfinite(table)).any(axis=0).sum()):
            raise ResultError(f"{bad} of {n_rows} rows have an entry that is not finite; drop such rows and count them")
        if not (np.isfinite(w) & (w > 0)).all():
            raise ResultError("a weight is not above 0")
        groups, i = np.unique(group, return_inverse=True)
        prompts, g = np.unique(prompt, return_inverse=True)
        n_group, n_prompt = len(groups), len(prompts)
        total = np.bincount(i, w, n_group)
        table = table - np.array([np.bincount(i, w * c, n_group) / total for c in table])[:, i]
        scale = np.sqrt((w * table * table).sum(axis=1) / w.sum())
        table = np.divide(table, scale[:, None], out=np.zeros_like(table), where=scale[:, None] > 0)
        cell, size = g * n_group + i, n_prompt * n_group

        def without(values: ndarray) -> Float[ndarray, "deletion group"]:
            parts = np.bincount(cell, values, size).reshape(n_prompt, n_group)
            whole = parts.sum(axis=0)
            left = np.vstack([whole[None], whole - parts])
            return np.where(np.abs(left) <= 1e-13 * np.abs(parts).sum(axis=0), 0.0, left)

        n = without(w)
        first = np.stack([without(w * c) for c in table], axis=-1)
        products = np.empty((n_prompt + 1, n_group, len(names), len(names)))
        with np.errstate(all="ignore"):
            for a, x in enumerate(table):
                for b, y in enumerate(table[: a + 1]):
                    centred = without(w * x * y) - first[..., a] * first[..., b] / n
                    products[..., a, b] = products[..., b, a] = np.where(n > 0, centred, 0.0)
        present = np.bincount(cell, minlength=size).reshape(n_prompt, n_group)
        return cls(names, groups, n, products, scale, present, n_rows)

    @property
    def n_prompts(self) -> int:
        return len(self.present)

    @property
    def sizes(self) -> Int[ndarray, "prompt"]:
        """Rows of each prompt."""
        return self.present.sum(axis=1)

    def _at(self, *names: str) -> list[int]:
        return [self.names.index(name) for name in names]

    def correlation(self, x: str, y: str) -> Float[ndarray, "deletion group"]:
        """Pearson's correlation of two columns within each group; nan where either is constant."""
        a, b = self._at(x, y)
        vx, vy = self.products[..., a, a], self.products[..., b, b]
        known = (vx > _CONSTANT * self.n) & (vy > _CONSTANT * self.n)
        with np.errstate(all="ignore"):
            return np.where(known, self.products[..., a, b] / np.sqrt(vx * vy), np.nan)

    def slopes(
        self, y: str, on: Sequence[str], group_weight: Float[ndarray, "group"] | None = None
    ) -> Float[ndarray, "deletion k"]:
        """Least squares of y on columns, an intercept for each group and slopes that all share; nan where not determined.

        group_weight: how often each group counts (default: once a row).
        """
        w = np.ones(len(self.groups)) if group_weight is None else np.asarray(group_weight, dtype=float)
        return self._solved(np.einsum("g,dgkl->dkl", w, self.products), self.n @ w, y, on)

    def slopes_each(self, y: str, on: Sequence[str]) -> Float[ndarray, "deletion group k"]:
        """The same with slopes of each group's own."""
        return self._solved(self.products, self.n, y, on)

    def _solved(self, products: ndarray, n: ndarray, y: str, on: Sequence[str]) -> ndarray:
        b, a = self._at(y)[0], self._at(*on)
        square, right = products[..., a, :][..., :, a], products[..., a, b]
        variance = np.diagonal(square, axis1=-2, axis2=-1)
        constant = variance <= _CONSTANT * n[..., None]
        size = np.sqrt(np.where(constant, 1.0, variance))
        with np.errstate(all="ignore"):
            unit = square / (size[..., :, None] * size[..., None, :])
            unit = np.where(np.isfinite(unit), unit, 0.0)
            known = (np.linalg.eigvalsh(unit)[..., 0] > 1e-9) & ~constant.any(axis=-1)
            unit = np.where(known[..., None, None], unit, np.eye(len(a)))
            found = np.linalg.solve(unit, (right / size)[..., None])[..., 0] / size
        found = np.where(known[..., None], found, np.nan)
        with np.errstate(all="ignore"):
            return found * (self.scale[b] / self.scale[a])

    def estimate(self, values: Float[ndarray, "deletion"], transform: Transform = None) -> Estimate:
        """A statistic of all groups, its value at every deletion given, with its jackknife interval."""
        return statistics.from_deletions(float(values[0]), values[1:], self.sizes, transform=transform)

    def ratio(self, numerator: Float[ndarray, "deletion"], denominator: Float[ndarray, "deletion"]) -> FiellerInterval:
        """Numerator ÷ denominator with Fieller's interval from their joint jackknife."""
        return ratio_from_deletions(numerator, denominator, self.sizes)

    def each(self, values: Float[ndarray, "deletion group"]) -> EachGroup:
        """A statistic of each group, by the jackknife over the prompts that the group has rows of."""
        here = self.present > 0
        count = here.sum(axis=0)
        with np.errstate(all="ignore"):
            left = np.where(here, values[1:], 0.0)
            centre = left.sum(axis=0) / count
            square = np.where(here, (values[1:] - centre) ** 2, 0.0).sum(axis=0)
            se = np.sqrt(square * (count - 1) / count)
        effective = np.array([effective_number(own) for own in (self.n[0] - self.n[1:]).T])  # rows by weight
        se = np.where((effective >= statistics.MIN_PROMPTS) & np.isfinite(values[0]), se, np.nan)
        return EachGroup(values[0], se, effective - 1.0)


def ratio_from_deletions(
    numerator: Float[ndarray, "deletion"],
    denominator: Float[ndarray, "deletion"],
    sizes: Int[ndarray, "prompt"],
    level: float = 0.95,
) -> FiellerInterval:
    """Numerator ÷ denominator, both given on all rows and without each prompt, with Fieller's interval (`statistics.fieller`).

    sizes: rows of each prompt.
    """

    both = np.column_stack([numerator, denominator])
    covariance, df = statistics.covariance_from_deletions(both[1:], sizes)
    t = float(stats.t.ppf((1 + level) / 2, df)) if np.isfinite(df) else 1.0
    parts = (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]))
    found = statistics.fieller_from(float(both[0, 0]), float(both[0, 1]), *parts, t)
    return replace(found, n_rows=int(sizes.sum()), n_prompts=len(sizes), n_effective=effective_number(sizes))
