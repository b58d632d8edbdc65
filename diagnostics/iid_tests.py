"""Tests that compare two dependent correlations of one variable, for rows taken as independent.

Tokens of one prompt are not independent: under ordinary clustering these tests reject 7–17 % of true nulls at a nominal
5 % (`diagnostics.wins` has a jackknife p-value beside them). Their results may stand in columns named `_iid`, for
comparison with papers, and never in a headline.
"""

import numpy as np
from jaxtyping import Float, Num
from numpy import ndarray
from scipy import stats

from interventions.errors import ResultError

Numbers = float | Num[ndarray, "..."]


def _read(r1: Numbers, r2: Numbers, r12: Numbers, n: Numbers) -> list[Float[ndarray, "..."]]:
    """The arguments as float64 of one shape; nan where any of them is."""
    given = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (r1, r2, r12, n)))
    unknown = np.isnan(given).any(axis=0)
    a, b, c, n = (np.where(unknown, np.nan, x) for x in given)
    if bad := int((n < 4).sum()):
        raise ResultError(f"{bad} of {n.size} samples have fewer than 4 rows; their Fisher z has no variance")
    if bad := int(((np.abs([a, b, c]) >= 1).any(axis=0)).sum()):
        raise ResultError(f"{bad} of {n.size} triples have a correlation outside (−1, 1); leave such triples out")
    if bad := int((1 - a * a - b * b - c * c + 2 * a * b * c < -1e-9).sum()):  # rounding of a determinant of 0
        seen = "of correlations that no three variables can have together"
        raise ResultError(f"{bad} of {n.size} triples {seen}; expected r(y, 1), r(y, 2), r(1, 2), in this order")
    return [a, b, c, n]


def _two_sided(z: ndarray) -> tuple[Numbers, Numbers]:
    p = 2 * stats.norm.sf(np.abs(z))
    return (z, p) if np.ndim(z) else (float(z), float(p))


def steiger(r1: Numbers, r2: Numbers, r12: Numbers, n: Numbers) -> tuple[Numbers, Numbers]:
    """Z and two-sided p of r(y, 1) = r(y, 2), by Fisher's z with the pooled correlation in the covariance; iid rows.

    Z = (artanh r1 − artanh r2)·√(n − 3)/√(2 − 2c), c = [r12(1 − 2r̄²) − ½r̄²(1 − 2r̄² − r12²)]/(1 − r̄²)², r̄ = (r1 + r2)/2.
    To compare |r1| with |r2|, give both as absolute values and r12 times the product of their signs.

    Takes rows for independent: rejects 7–17 % of true nulls at a nominal 5 % under ordinary clustering. For columns named
    `_iid`, never for a headline.

    Correlations in (−1, 1) and n rows, numbers or arrays of one shape; nan gives nan. Raises `ResultError` for n < 4, a
    correlation outside (−1, 1), and triples that no three variables can have.
    Source: Steiger 1980, equations 10 and 14 (Dunn & Clark 1969 with r̄).
    """
    a, b, c, n = _read(r1, r2, r12, n)
    square = ((a + b) / 2) ** 2
    shared = (c * (1 - 2 * square) - square * (1 - 2 * square - c * c) / 2) / (1 - square) ** 2
    with np.errstate(all="ignore"):
        return _two_sided((np.arctanh(a) - np.arctanh(b)) * np.sqrt((n - 3) / (2 - 2 * shared)))


def meng_rosenthal_rubin(r1: Numbers, r2: Numbers, r12: Numbers, n: Numbers) -> tuple[Numbers, Numbers]:
    """Z and two-sided p of r(y, 1) = r(y, 2), by Fisher's z with the mean square correlation; iid rows.

    Z = (artanh r1 − artanh r2)·√((n − 3)/(2(1 − r12)h)), h = (1 − f·m)/(1 − m), f = min(1, (1 − r12)/(2(1 − m))),
    m = (r1² + r2²)/2. To compare |r1| with |r2|: as for `steiger`.

    Takes rows for independent: rejects 7–17 % of true nulls at a nominal 5 % under ordinary clustering. For columns named
    `_iid`, never for a headline.

    Arguments, results and errors are those of `steiger`. Source: Meng, Rosenthal & Rubin 1992, equations 1 to 3.
    """
    a, b, c, n = _read(r1, r2, r12, n)
    m = (a * a + b * b) / 2
    f = np.minimum(1, (1 - c) / (2 * (1 - m)))
    h = (1 - f * m) / (1 - m)
    return _two_sided((np.arctanh(a) - np.arctanh(b)) * np.sqrt((n - 3) / (2 * (1 - c) * h)))
