from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diagnostics.results.result import BaseResult
from diagnostics.saved import KINDS
from diagnostics.specifications.design import CLAIMS
from diagnostics.specifications.result import Specifications
from diagnostics.statistics.estimate import Estimate, verdict
from diagnostics.statistics.tables import TRAINED
from tests.reports import measured

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def headlines(result):
    return list(result.headlines())


def test_every_kind_has_a_title_a_question_and_headlines():
    for kind in KINDS.values():
        assert kind.headlines is not BaseResult.headlines and kind.TITLE and kind.QUESTION.endswith("?"), kind


def test_headlines_are_ratios_at_the_middle_block():
    found = headlines(measured())
    (group,) = [g for g in measured().groups if g["layer"] == 4]
    names = [name for name in group if " ÷ " in name and "mean" not in name]
    assert [h.value for h in found] == [str(group[name]) for name in names] and len(names) == 2
    assert all("block 4" in h.what and h.against.startswith("1: no more") for h in found)


def test_headlines_are_compared_with_randomly_initialised_models():
    frame = measured().frame
    both = pd.concat([frame, frame.assign(model="random 0"), frame.assign(model="random 1", kl=frame.kl * 3.0)])
    p = measured().provenance | {"null_models": ["random 0", "random 1"]}
    found = headlines(replace(measured(), frame=both, provenance=p))
    own = [h.value.partition(" ")[0] for h in headlines(measured())]
    assert [h.against for h in found] == [
        f"1: no more than turning as far (not resolved); randomly initialised models: {value} (not resolved)"
        for value in own
    ]


def test_verdicts():
    """The absence of a significant difference is not equivalence."""

    def said(low, high, *nulls):
        return verdict(Estimate(1.0, low, high, 0.1, 100, 30), *nulls)

    assert said(0.9, 1.1, 1.0) == "equivalent" and said(1.05, 1.2, 1.0) == "equivalent"
    assert said(0.6, 1.1, 1.0) == "not resolved" and said(0.9, 1.3, 1.0) == "not resolved"
    assert said(1.1, 1.3, 1.0) == "larger" and said(0.3, 0.7, 1.0) == "smaller"
    assert said(np.nan, np.nan, 1.0) == "not resolved" and said(2.0, np.inf, 1.0) == "larger"
    # Against several models: of all of them.
    assert said(0.9, 1.1, 0.95, 1.05) == "equivalent" and said(0.9, 1.1, 0.7, 1.0) == "not resolved"
    assert said(1.1, 2.0, 0.7, 1.0) == "larger" and said(1.1, 2.0, 0.7, 1.5) == "not resolved"


def test_specification_curve_headlines_are_shares():
    lines = [
        {"claim": claim, "model": model, "value": 2.0, "low": low, "high": 3.0, "n_prompts": 50}
        for claim in CLAIMS for model, lows in ((TRAINED, (1.5, 0.5)), ("random 0", (1.5, 1.5))) for low in lows
    ]  # fmt: skip
    found = headlines(Specifications(pd.DataFrame(lines), {"boolq": {}}))
    assert [(h.value, h.against) for h in found] == [("50%", "randomly initialised models: 100% to 100%")] * 2
    assert all("of 2" in h.what for h in found)
