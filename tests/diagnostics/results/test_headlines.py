from dataclasses import replace

import pandas as pd
import pytest

from diagnostics.results.result import BaseResult
from diagnostics.saved import KINDS
from diagnostics.specifications.design import CLAIMS
from diagnostics.specifications.result import Specifications
from diagnostics.statistics.tables import TRAINED
from tests.reports import measured, planted

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def headlines(result):
    return list(result.headlines())


def test_every_kind_says_what_it_asks_and_what_to_look_at_first():
    for kind in KINDS.values():
        assert kind.headlines is not BaseResult.headlines and kind.TITLE and kind.QUESTION.endswith("?"), kind


def test_a_kind_that_is_not_ours_has_none():
    assert headlines(planted()) == []


def test_the_middle_block_s_ratios_stand_with_their_intervals():
    found = headlines(measured())
    (group,) = [g for g in measured().groups if g["layer"] == 4]
    names = [name for name in group if " ÷ " in name]
    assert [h.value for h in found] == [str(group[name]) for name in names] and len(names) == 2
    assert all("block 4" in h.what and h.against.startswith("1: no more") for h in found)


def test_untrained_networks_are_what_a_number_is_compared_with():
    frame = measured().frame
    both = pd.concat([frame, frame.assign(model="random 0"), frame.assign(model="random 1", kl=frame.kl * 3.0)])
    found = headlines(
        replace(measured(), frame=both, provenance=measured().provenance | {"null_models": ["random 0", "random 1"]})
    )
    own = [h.value.partition(" ")[0] for h in headlines(measured())]
    assert [h.against for h in found] == [
        f"1: no more than turning as far; untrained networks: {value}" for value in own
    ]


def test_a_specification_curve_counts_what_survives():
    lines = [
        {"claim": claim, "model": model, "value": 2.0, "low": low, "high": 3.0, "n_prompts": 50}
        for claim in CLAIMS for model, lows in ((TRAINED, (1.5, 0.5)), ("random 0", (1.5, 1.5))) for low in lows
    ]  # fmt: skip
    found = headlines(Specifications(pd.DataFrame(lines), {"boolq": {}}))
    assert [(h.value, h.against) for h in found] == [("50%", "untrained networks: 100% to 100%")] * 2
    assert all("of 2" in h.what for h in found)
