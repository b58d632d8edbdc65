"""How often 95 % intervals hold the truth, at the tails that effects on a model have: `python -m tests.coverage --replications 1000`.

Rows of two edits, KLs log-normal: logarithms with standard deviations (s, t) from {.5, 1, 2, 3}², a correlation of .1, .3 or .6
within a prompt, 20, 40 or 100 prompts of equal size, of Zipf sizes (the i-th prompt has a share ~ 1/i) or one with half of the rows.
`--write docs/statistics_coverage.md` writes the page of tables that `docs/statistics.md` refers to. An interval serves a headline where in no cell the
99 % Monte Carlo interval of its coverage lies wholly below 92 %, nor that of its misses on one side wholly above twice those on the
other. Cells with fewer than 10 effective prompts must give no interval.
"""

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from scipy import stats

from diagnostics import statistics

SPREADS, CORRELATIONS, PROMPTS, SIZES = (0.5, 1.0, 2.0, 3.0), (0.1, 0.3, 0.6), (20, 40, 100), ("equal", "Zipf", "half")
ROWS_PER_PROMPT, LEAST = 6, 0.92
Interval = tuple[float, float]


class Cell(NamedTuple):
    """One design."""

    s: float
    t: float
    correlation: float
    prompts: int
    sizes: str

    def rows(self) -> ndarray:
        """Rows of each prompt, one at least."""
        share = np.ones(self.prompts)
        if self.sizes == "Zipf":
            share = 1 / np.arange(1, self.prompts + 1)
        elif self.sizes == "half":
            share[0] = self.prompts - 1
        return np.maximum(1, np.rint(share / share.sum() * ROWS_PER_PROMPT * self.prompts)).astype(int)

    def draws(self, replications: int, seed: int, pairs: bool = False) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        """KLs of two edits and the prompts of their rows, again and again; with `pairs` of two prompts each, both with effects."""
        key = [seed, *(int(10 * x) for x in self[:4]), SIZES.index(self.sizes), int(pairs)]
        rng, sizes = np.random.default_rng(key), self.rows()
        for _ in range(replications):
            prompt = np.repeat(np.arange(self.prompts), sizes)
            effects = [rng.normal(size=(2, self.prompts))[:, prompt]]
            if pairs:
                other = (prompt + rng.integers(1, self.prompts, len(prompt))) % self.prompts
                effects.append(rng.normal(size=(2, self.prompts))[:, other])
                prompt = np.column_stack([prompt, other])
            shared = self.correlation / len(effects)
            logs = sum(np.sqrt(shared) * e for e in effects)
            logs = logs + np.sqrt(1 - self.correlation) * rng.normal(size=(2, len(prompt)))
            a, b = np.exp(np.array([[self.s], [self.t]]) * logs)
            yield a, b, prompt


# ---- the candidates: an interval for the logarithm of a ratio, and its true value ----


def median_ratio(a: ndarray, b: ndarray, prompt: ndarray) -> Interval:
    found = statistics.median_ratio(a, b, 0.0, prompt)
    return float(np.log(found.low)), float(np.log(found.high))


def median(a: ndarray, b: ndarray, prompt: ndarray) -> Interval:
    found = statistics.median(a, prompt)
    with np.errstate(all="ignore"):
        return float(np.log(found.low)), float(np.log(found.high))


def geometric(a: ndarray, b: ndarray, prompt: ndarray) -> Interval:
    found = statistics.mean(np.log(a / b), prompt)
    return found.low, found.high


def share(a: ndarray, b: ndarray, prompt: ndarray) -> Interval:
    """Of rows whose first edit does more, ½ in truth."""
    found = statistics.share(a > b, prompt)
    return found.low - 0.5, found.high - 0.5


def ranks(a: ndarray, b: ndarray, prompt: ndarray) -> Interval:
    """Of the two edits, uncorrelated in truth."""
    found = statistics.correlation(a, b, prompt, "spearman")
    return found.low, found.high


def ratio_of_means(a: ndarray, b: ndarray, prompt: ndarray) -> Interval:
    found = statistics.log_ratio_of_means(a, b, prompt)
    return float(np.log(found.low)), float(np.log(found.high))


def _sums(a: ndarray, b: ndarray, prompt: ndarray) -> ndarray:
    return np.stack([np.bincount(prompt, x) for x in (a, b)])


def _studentised(sums: ndarray) -> tuple[ndarray, ndarray]:
    """The log ratio of sums over prompts `[..., 2, prompt]`, and its linearised standard error."""
    total = sums.sum(axis=-1)
    parts = sums[..., 0, :] / total[..., :1] - sums[..., 1, :] / total[..., 1:]
    n = sums.shape[-1]
    return np.log(total[..., 0] / total[..., 1]), np.sqrt((parts**2).sum(axis=-1) * n / (n - 1))


def bootstrap(a: ndarray, b: ndarray, prompt: ndarray, draws: int = 399) -> Interval:
    """Of the ratio of means: the studentised bootstrap over prompts."""
    sums = _sums(a, b, prompt)
    value, se = _studentised(sums)
    drawn = np.random.default_rng(len(a)).integers(sums.shape[1], size=(draws, sums.shape[1]))
    values, errors = _studentised(np.moveaxis(sums[:, drawn], 0, 1))
    low, high = np.percentile((values - value) / errors, [2.5, 97.5])
    return float(value - high * se), float(value - low * se)


def skewed(a: ndarray, b: ndarray, prompt: ndarray) -> Interval:
    """Of the ratio of means: Johnson's t corrected for the skewness of the prompts' influences."""
    sums = _sums(a, b, prompt)
    value, se = _studentised(sums)
    total, n = sums.sum(axis=1), sums.shape[1]
    parts = n * (sums[0] / total[0] - sums[1] / total[1])
    third = float(((parts - parts.mean()) ** 3).mean() / parts.var(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * float(se)
    return float(value) + third / (6 * n) - half, float(value) + third / (6 * n) + half


def double_bootstrap(a: ndarray, b: ndarray, prompt: ndarray, outer: int = 199, inner: int = 99) -> Interval:
    """Of the ratio of means: percentiles of the bootstrap over prompts, their level calibrated by a second bootstrap."""
    sums = _sums(a, b, prompt)
    n = sums.shape[1]
    rng = np.random.default_rng(len(a))
    value = np.log(sums[0].sum() / sums[1].sum())
    first = rng.integers(n, size=(outer, n))
    log_ratio = lambda picked: np.log(sums[0][picked].sum(-1) / sums[1][picked].sum(-1))  # noqa: E731
    values = log_ratio(first)
    second = np.take_along_axis(first[:, None], rng.integers(n, size=(outer, inner, n)), axis=-1)
    place = (log_ratio(second) <= value).mean(axis=1)  # where the first level's value lies among the second level's
    low, high = np.percentile(place, [2.5, 97.5])
    return float(np.quantile(values, low)), float(np.quantile(values, high))


Truth = Callable[[Cell], float]
ZERO: Truth = lambda cell: 0.0  # noqa: E731
OF_MEANS: Truth = lambda cell: (cell.s**2 - cell.t**2) / 2  # noqa: E731
HEADLINES: dict[str, tuple[Callable[..., Interval], Truth]] = {
    "median ratio": (median_ratio, ZERO),
    "median": (median, ZERO),
    "share": (share, ZERO),
    "rank correlation": (ranks, ZERO),
}
REJECTED: dict[str, tuple[Callable[..., Interval], Truth]] = {
    "mean log ratio": (geometric, ZERO),
    "ratio of means, jackknife": (ratio_of_means, OF_MEANS),
    "ratio of means, studentised bootstrap": (bootstrap, OF_MEANS),
    "ratio of means, Johnson's t": (skewed, OF_MEANS),
}
CORNERS = [
    Cell(s, t, correlation, prompts, "equal")
    for (s, t), correlation, prompts in itertools.product(
        ((0.5, 0.5), (2.0, 0.5), (2.0, 2.0), (3.0, 1.0)), (0.1, 0.6), PROMPTS
    )
]


def cells() -> list[Cell]:
    """Every combination."""
    return [Cell(*each) for each in itertools.product(SPREADS, SPREADS, CORRELATIONS, PROMPTS, SIZES)]


class Covered(NamedTuple):
    """Of one candidate and cell."""

    n: int
    too_high: int
    """intervals above the truth"""
    too_low: int
    none: int
    """replications without an interval"""

    @property
    def coverage(self) -> float:
        return 1 - (self.too_high + self.too_low) / self.n if self.n else np.nan

    @property
    def fails(self) -> str:
        """Why no headline may stand on it, or nothing: 99 % Clopper-Pearson intervals."""
        misses = self.too_high + self.too_low
        if not self.n:
            return ""
        if stats.beta.ppf(0.995, self.n - misses + 1, misses) < LEAST if misses else False:
            return "coverage"
        worse = max(self.too_high, self.too_low)
        if misses and stats.beta.ppf(0.005, worse, misses - worse + 1) > 2 / 3:
            return "one-sided"
        return ""


def covered(
    interval: Callable[..., Interval], truth: float, draws: Iterator[tuple[ndarray, ndarray, ndarray]]
) -> Covered:
    """How often an interval holds the truth, and on which side it misses."""
    above = below = none = n = 0
    for a, b, prompt in draws:
        low, high = interval(a, b, prompt)
        known = not (np.isnan(low) and np.isnan(high))
        n, none = n + known, none + (not known)
        above, below = above + (low > truth), below + (high < truth)
    return Covered(n, above, below, none)


def study(some: list[Cell], replications: int, seed: int, candidates: dict, pairs: bool = False) -> dict:
    """Every candidate on the same rows of every cell."""
    found: dict[tuple[str, Cell], Covered] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in some:
            rows = list(cell.draws(replications, seed, pairs))
            for name, (interval, truth) in candidates.items():
                found[name, cell] = covered(interval, truth(cell), iter(rows))
    return found


def lines(found: dict[tuple[str, Cell], Covered], how: str) -> Iterator[str]:
    """A line of Markdown for each candidate: its range over cells, and the cells that fail."""
    for name in dict.fromkeys(name for name, _ in found):
        own = {cell: c for (one, cell), c in found.items() if one == name}
        given = {cell: c for cell, c in own.items() if c.n}
        if not given:
            continue
        worst = min(given.values(), key=lambda c: c.coverage)
        failed = [c for c in given.values() if c.fails]
        best = max(c.coverage for c in given.values())
        sides = max(given.values(), key=lambda c: max(c.too_high, c.too_low))
        yield (
            f"| {name} | {how} | {len(given)} | {len(own) - len(given)} | {100 * worst.coverage:.1f}–{100 * best:.1f} "
            f"| {100 * sides.too_high / sides.n:.1f}, {100 * sides.too_low / sides.n:.1f} | {len(failed)} |"
        )


TITLE = """# Coverage of the intervals

*How often nominal 95 % intervals hold the truth, at the tails that effects on a model have.*

Rows of two edits, log-normal: standard deviations of the logarithms from {{.5, 1, 2, 3}}² (in the demo those of a norm patch and of its
rotation are 2.5 to 3.5, of a direction patch .5 to 1.1), a correlation of .1, .3 or .6 within a prompt, 20, 40 or 100 prompts of equal
size, of Zipf sizes, or one with half of the rows; six rows a prompt on average. Pairs: each row has two prompts, both with effects. A design
fails where the 99 % Monte Carlo interval of its coverage lies wholly below 92 %, or that of its misses is wholly more one-sided than
2 : 1. Designs with fewer than 10 effective prompts (20 prompts of Zipf sizes, one prompt with half of the rows) have no interval.
{replications:,} replications a design, seed {seed}: `python -m tests.coverage --write docs/statistics_coverage.md`.
"""
HEAD = """| statistic | prompts of a row | designs | without interval | coverage, % | most one-sided misses: above, below, % | designs that fail |
|---|---|---|---|---|---|---|"""


def by_spread(found: dict[tuple[str, Cell], Covered], names: list[str]) -> Iterator[str]:
    """The least coverage at each pair of standard deviations."""
    yield "| standard deviations | " + " | ".join(names) + " |\n|---|" + "---|" * len(names)
    for s, t in itertools.combinations_with_replacement(SPREADS, 2):
        least = []
        for name in names:
            some = [
                c.coverage for (one, cell), c in found.items() if one == name and {cell.s, cell.t} == {s, t} and c.n
            ]
            least.append(f"{100 * min(some):.1f}" if some else "")
        if any(least):
            yield f"| {s:g}, {t:g} | " + " | ".join(least) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the Markdown file")
    args = parser.parse_args()
    every, text = cells(), []
    one = study(every, args.replications, args.seed, HEADLINES)
    two = study([c for c in every if c.sizes == "equal"], args.replications, args.seed, HEADLINES, pairs=True)
    other = study([c for c in every if c.sizes != "half"], args.replications, args.seed, REJECTED)
    corners = study(
        CORNERS,
        min(args.replications, 1000),
        args.seed,
        {"ratio of means, double bootstrap": (double_bootstrap, OF_MEANS)},
    )
    text += [TITLE.format(replications=args.replications, seed=args.seed), HEAD]
    for found, how in (
        (one, "one"),
        (two, "two"),
        (other, "one"),
        (corners, "one, of 24 designs"),
    ):
        text += lines(found, how)
    text += ["", "Least coverage, in percent, by the standard deviations of the two logarithms:", ""]
    text += by_spread(one | other, ["median ratio", "median", *REJECTED])
    page = "\n".join(text) + "\n"
    print(page)
    if args.write:
        args.write.write_text(page)


if __name__ == "__main__":
    main()
