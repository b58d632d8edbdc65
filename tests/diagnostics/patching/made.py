"""Frames of activation patching from a random number generator, with planted cells."""

import numpy as np
import pandas as pd

LABELS = ("BOS", "IO-1", "IO", "and", "S1", "S1+1", "2", "3", "4", "S2", "S2+1", "5", "6", "END")


def frame(
    planted=(),
    *,
    pairs=60,
    layers=30,
    heads=9,
    labels=LABELS,
    first=9,
    site="z",
    controls=1,
    noise=0.01,
    scores=(),
    seed=0,
):
    """A line for each pair × direction × cell × control; cells before label number `first` are 0 exactly and not run.

    planted: {(layer, head, label): share}. effect = share · total + noise · total · normal; controls have share 0. Scores:
    effect · .8 + noise, of control 0.
    """
    rng, planted = np.random.default_rng(seed), dict(planted)
    total = rng.gamma(6.0, 0.6, pairs) + 0.5
    own = [-1] if heads == 0 else list(range(heads))
    index = pd.MultiIndex.from_product(
        [range(pairs), ("denoise", "noise"), range(layers), own, range(len(labels)), range(controls + 1)],
        names=["pair", "direction", "layer", "head", "position", "control"],
    )
    found = index.to_frame(index=False)
    position = found["position"].to_numpy()
    found["run"] = position >= first
    found = found[found["run"] | (found["control"] == 0)].reset_index(drop=True)
    found["label"] = np.array(labels)[found["position"].to_numpy()]
    found["pool"], found["site"] = 0, site
    found["total"] = total[found["pair"].to_numpy()]
    cell = pd.MultiIndex.from_frame(found[["layer", "head", "label"]])
    share = pd.Series(planted, dtype=float).reindex(cell).fillna(0.0).to_numpy() if planted else np.zeros(len(found))
    effect = found["total"] * (np.where(found["control"] == 0, share, 0.0) + noise * rng.standard_normal(len(found)))
    found["effect"] = np.where(found["run"], effect, 0.0)
    found["dose"] = np.where(found["run"], 0.5, 0.0)
    found["m_corrupt"] = -1.0
    found["m_clean"] = found["m_corrupt"] + found["total"]
    denoise = found["direction"] == "denoise"
    found["m"] = np.where(denoise, found["m_corrupt"] + found["effect"], found["m_clean"] - found["effect"])
    for name in scores:
        score = 0.8 * found["effect"] + noise * rng.standard_normal(len(found))
        found[name] = np.where(found["control"] == 0, np.where(found["run"], score, 0.0), np.nan)
    return found
