"""What the fits say: parameters with intervals, the largest width predicted from the others, forms compared by that."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from diagnostics.scaling_laws.fit import FORMS, JOINT, REDUCIBLE, Fit, Losses, fit, refits
from interventions.errors import ResultError

LAST = "value at the next smaller width"
"""The null of a prediction: nothing changes from there."""
ERROR = "mean |log predicted − log observed|"
_OF_THE_FIT = ("starts at the best objective", "rms of log residuals")  # without intervals
COLUMNS = ("part", "form", "what", "n", "k", "value", "low", "high", "low_prompts", "high_prompts", "observed", "note")
Runs = Float[ndarray, "run"]


def law_rows(n: Runs, k: Runs, losses: Losses, n_prompts: int, draws: int, stream: np.random.Generator) -> pd.DataFrame:
    """A line for each number of each form's fit to all runs (`fit`), and for each loss at the largest width as the others predict it (`held out`).

    losses: see `refits`; its intervals are `low`, `high` over runs and prompts, `low_prompts`, `high_prompts` over prompts alone.
    Of a prediction: percentiles of refits times one of their own residuals, so that they hold for an SAE trained anew. A form that a
    fit fails for has a line `failed`, and its `note` says why.
    """
    lines = [*_fits(n, k, losses, n_prompts, draws, stream), *_held_out(n, k, losses, n_prompts, draws, stream)]
    return pd.DataFrame(lines, columns=list(COLUMNS)).astype({"note": str, "form": str, "what": str})


def numbers(form: str, ks: list[float]) -> Iterator[tuple[str, float, Callable[[Fit], float]]]:
    """The numbers of a form: name, k (nan: of none), and how a fit gives it."""
    for name in FORMS[form]:
        yield name, np.nan, lambda one, name=name: one.values[name]
    if form in (JOINT, REDUCIBLE):
        for k in ks:
            yield "exponent of n", k, lambda one, k=k: float(one.slope(np.array(k)))
    if form == JOINT:
        for k in ks:
            yield (
                "irreducible loss",
                k,
                lambda one, k=k: float(np.exp(one.values["zeta"] + one.values["eta"] * np.log(k))),
            )
    yield "starts at the best objective", np.nan, lambda one: float(one.n_starts)
    yield "rms of log residuals", np.nan, lambda one: float(np.sqrt(np.square(one.residuals).mean()))


def _fits(
    n: Runs, k: Runs, losses: Losses, n_prompts: int, draws: int, stream: np.random.Generator
) -> Iterator[dict[str, Any]]:
    loss, ks = losses(None), sorted(set(k.tolist()))
    for form in FORMS:
        line = partial(_line, "fit", form)
        try:
            found = fit(n, k, loss, form)
        except ResultError as error:
            yield line("failed", note=str(error))
            continue
        again = partial(refits, n, k, losses, found, stream, draws=draws, n_prompts=n_prompts)
        both, prompts = again(runs=True), again(runs=False)
        failed = both.failed + prompts.failed
        note = "; ".join(
            filter(None, [found.note, f"{failed} of {2 * draws} refits did not converge" if failed else ""])
        )
        for what, at, number in numbers(form, ks):
            ends: dict[str, float] = dict(zip(("low", "high"), both.interval(number), strict=True))
            if n_prompts:
                ends |= dict(zip(("low_prompts", "high_prompts"), prompts.interval(number), strict=True))
            if what in _OF_THE_FIT:
                ends = {}
            yield line(what, k=at, value=number(found), note=note, **ends)


def _held_out(
    n: Runs, k: Runs, losses: Losses, n_prompts: int, draws: int, stream: np.random.Generator
) -> Iterator[dict[str, Any]]:
    loss, largest = losses(None), n.max()
    rest, out = n < largest, n == largest
    observed = loss[out]
    for form in FORMS:
        line = partial(_line, "held out", form)
        try:
            found = fit(n[rest], k[rest], loss[rest], form)
        except ResultError as error:
            yield line("failed", n=largest, note=str(error))
            continue
        again = refits(n[rest], k[rest], lambda c: losses(c)[rest], found, stream, draws=draws, n_prompts=n_prompts)
        own = [one.predict(n[out], k[out]) * np.exp(stream.choice(one.residuals, int(out.sum()))) for one in again.fits]
        low, high = np.quantile(own, (0.025, 0.975), axis=0) if len(own) >= 20 else np.full((2, out.sum()), np.nan)
        predicted = found.predict(n[out], k[out])
        for i, at in enumerate(k[out]):
            ends = {"low": low[i], "high": high[i]}
            yield line("loss", n=largest, k=at, value=predicted[i], observed=observed[i], note=found.note, **ends)
        yield line(ERROR, n=largest, value=_error(predicted, observed), note=found.note)
    before = n == n[rest].max()
    known = dict(zip(k[before].tolist(), loss[before].tolist(), strict=True))
    if set(k[out].tolist()) <= known.keys():
        predicted = np.array([known[at] for at in k[out].tolist()])
        for at, p, o in zip(k[out], predicted, observed, strict=True):
            yield _line("held out", LAST, "loss", n=largest, k=at, value=p, observed=o)
        yield _line("held out", LAST, ERROR, n=largest, value=_error(predicted, observed))


def _error(predicted: Runs, observed: Runs) -> float:
    return float(np.abs(np.log(predicted / observed)).mean())


def _line(part: str, form: str, what: str, *, note: str = "", **numbers: Any) -> dict[str, Any]:
    line: dict[str, Any] = dict.fromkeys(COLUMNS, np.nan)
    return line | {"part": part, "form": form, "what": what, "note": note} | numbers
