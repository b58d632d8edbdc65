"""Results for tests of pages: one measured on a tiny model, and one with given numbers, reasons and names."""

import functools
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd

from diagnostics.results.result import Result
from diagnostics.statistics.estimate import Estimate
from diagnostics.unit_norm.result import UnitNorm
from diagnostics.unit_norm.run import unit_norm_sweep
from tests.tiny import prompts, tiny_model

EVIL = "<script>alert(\"1\")</script> & 'x' {{ 7 * 7 }} \u202ebidi"


@functools.cache
def measured() -> UnitNorm:
    """A unit-norm sweep of the tiny model, which tests must not change."""
    return unit_norm_sweep(
        tiny_model("llama"), prompts((9, 11, 13, 8, 12, 10, 9, 14, 11, 10, 12, 9)), layers=(1, 4), tokens=20
    )


def with_provenance(**more) -> UnitNorm:
    """The measured result with `more` in its provenance."""
    return replace(measured(), provenance=measured().provenance | more)


class Planted(Result):
    """Forty rows whose numbers are not in order."""

    NAME, NOTE = "planted", "what the numbers are"

    @property
    def groups(self):
        return [
            {"sae": f"sae {i}", "share": Estimate((7 * i) % 40 / 10, 0.0, 9.0, 0.1, 9, 12 if i < 3 else 30)}
            for i in range(40)
        ]

    def plot(self):
        figure, ax = plt.subplots(figsize=(2, 1))
        ax.plot([1, 2])
        return figure


def planted(**more) -> Planted:
    """A result with made-up provenance, and `more` in it."""
    p = {
        "model": "a model",
        "saes": {"one": {"sha256": "ab"}},
        "rows_dropped": {},
        "why_hooks": None,
        "null_models": [],
    }
    return Planted(pd.DataFrame({"kl": [1.0]}), [[1, 2]], p | more)
