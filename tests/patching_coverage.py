"""How often the 95 % intervals of a cell's share hold the truth, and what is found where nothing is: `python -m tests.patching_coverage`.

Effects of pairs are signed and light-tailed next to KLs; every replication is a cell of one frame, so that `summary.cells` itself is
measured.
"""

import numpy as np
import pandas as pd

from diagnostics.patching.summary import cells

REPLICATIONS = 2000
PAIRS = (20, 40, 100)


def drawn(kind, n, rng):
    """(effect, total) [replication, n] and the true share."""
    total = rng.gamma(6.0, 0.6, (REPLICATIONS, n)) + 0.5
    normal = rng.standard_normal((REPLICATIONS, n))
    if kind == "proportional":  # every pair by 10 % of its total, give or take as much
        return total * (0.1 + 0.1 * normal), total, 0.1
    if kind == "unrelated":  # a shift that does not go with the total
        return 0.4 + 0.4 * normal, total, 0.4 / (3.6 + 0.5)
    if kind == "both signs":
        return total * 0.3 * normal, total, 0.0
    if kind == "one pair in ten":
        return total * 0.5 * (rng.random((REPLICATIONS, n)) < 0.1), total, 0.05
    if kind == "skewed":  # log-normal, standard deviation of the logarithm 1
        return total * 0.05 * np.exp(normal - 0.5), total, 0.05
    # t with 3 degrees of freedom
    return total * (0.1 + 0.1 * rng.standard_t(3, (REPLICATIONS, n))), total, 0.1


KINDS = ("proportional", "unrelated", "both signs", "one pair in ten", "skewed", "t, 3 df")


def as_frame(effect, total, control):
    """A frame whose cells are replications."""
    many, n = effect.shape
    layer, pair = np.repeat(np.arange(many), n), np.tile(np.arange(n), many)
    lines = {
        "pool": 0,
        "direction": "denoise",
        "site": "resid_pre",
        "layer": layer,
        "head": -1,
        "label": "END",
        "pair": pair,
    }
    lines |= {"position": 0, "total": total.ravel(), "dose": 0.1, "run": True}
    return pd.concat(
        [pd.DataFrame(lines | {"effect": x.ravel(), "control": k}) for k, x in enumerate((effect, control))]
    )


def main():
    print(
        "| effects | pairs | coverage of the intervals given | truth below, above | no interval | p < 5 % where effect and control are drawn "
        "alike |\n|---|---|---|---|---|---|"
    )
    for number, kind in enumerate(KINDS):
        for n in PAIRS:
            rng = np.random.default_rng([number, n])
            effect, total, truth = drawn(kind, n, rng)
            # The control as another draw with the same totals: nothing to find.
            control = drawn(kind, n, rng)[0]
            found = cells(as_frame(effect, total, control))
            given = found.dropna(subset=["share_low", "share_high"])
            below, above = (given["share_low"] > truth).mean(), (given["share_high"] < truth).mean()
            print(
                f"| {kind} | {n} | {1 - below - above:.1%} | {below:.1%}, {above:.1%} | {1 - len(given) / len(found):.1%} | "
                f"{(found['p'] < 0.05).mean():.1%} |"
            )


if __name__ == "__main__":
    main()
