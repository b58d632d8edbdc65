"""Numbers of the protocols: one for each seed, their median and range over seeds; no interval, for there are few seeds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.polarity.training import SIGNED, UNSIGNED
from diagnostics.statistics.tables import each, where

FAMILIES = tuple(zip(SIGNED, UNSIGNED, strict=True))
ERROR, SLOPES, AUROC, ONE = "error ratio at equal L0", ("slope +", "slope −"), "AUROC", "pairs in one latent"
REPRESENTED = "polarities represented"


def dial_of(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines of protocol A: as many pairs as dimensions."""
    return where(frame, frame["superposition"] == 1)


def at_equal_l0(signed: pd.DataFrame, unsigned: pd.DataFrame) -> tuple[float, float]:
    """L0 in the geometric middle of the range that both sweeps cover, and the ratio of the unexplained shares there, signed ÷ unsigned.

    Linear between log L0 and log error. nan where the ranges have nothing in common.
    """
    curves = []
    for some in (signed, unsigned):
        some = some.sort_values("l0")
        curves.append((np.log(some["l0"].to_numpy(float)), np.log(some["error"].to_numpy(float))))
    (a, error_a), (b, error_b) = curves
    low, high = max(a[0], b[0]), min(a[-1], b[-1])
    if not low <= high:
        return np.nan, np.nan
    at = (low + high) / 2
    return float(np.exp(at)), float(np.exp(np.interp(at, a, error_a) - np.interp(at, b, error_b)))


def numbers(frame: pd.DataFrame, anomalies: pd.DataFrame, middle: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Every number of the three protocols as a group. middle: the sparsity of each selector for slopes and protocol C."""
    dial = dial_of(frame)
    for (rho,), some in each(dial, ["rho"]):
        for signed, unsigned in FAMILIES:
            found = [
                at_equal_l0(where(own, own["selector"] == signed), where(own, own["selector"] == unsigned))
                for _, own in each(some, ["seed"])
            ]
            l0 = [at for at, _ in found]
            yield _group("A", ERROR, f"{signed} ÷ {unsigned}", [ratio for _, ratio in found], rho=rho, l0=_median(l0))
    for (rho, selector), some in each(_middle(dial, middle), ["rho", "selector"]):
        l0 = _median(some["l0"].tolist())
        for what, column in zip((*SLOPES, REPRESENTED), ("slope_plus", "slope_minus", "represented"), strict=True):
            yield _group("A", what, selector, some[column].tolist(), rho=rho, l0=l0)
    for (read, score, m), some in each(anomalies, ["read", "score", "m"]):
        what = AUROC if score == "deviation" else f"{AUROC} of ‖x − x̂‖"
        yield _group("B", what, read, some["auroc"].tolist(), m=int(m))
    geometry = _middle(where(frame, frame["selector"].isin(SIGNED).to_numpy()), middle)
    for (rho, superposition, selector), some in each(geometry, ["rho", "superposition", "selector"]):
        l0 = _median(some["l0"].tolist())
        found = some["consolidated"].tolist()
        yield _group("C", ONE, selector, found, rho=rho, superposition=superposition, l0=l0)


def _middle(frame: pd.DataFrame, middle: Mapping[str, float]) -> pd.DataFrame:
    return where(frame, (frame["sparsity"] == frame["selector"].map(dict(middle)).astype(float)).to_numpy())


def _group(protocol: str, what: str, sae: str, values: Sequence[float], **place: Any) -> dict[str, Any]:
    known = [v for v in values if np.isfinite(v)]
    at = {"rho": None, "superposition": None, "m": None, "l0": None} | place
    low, high = (min(known), max(known)) if known else (np.nan, np.nan)
    own = {"median": _median(values), "lowest": low, "highest": high, "seeds": len(known)}
    return {"protocol": protocol, "what": what, "sae": sae} | at | own


def _median(values: Sequence[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.median(known)) if known else np.nan
