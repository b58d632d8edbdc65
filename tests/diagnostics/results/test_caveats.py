import numpy as np
import pandas as pd
import pytest

from diagnostics.results.caveats import caveats, differences
from diagnostics.specifications.result import Specifications
from tests.reports import measured, planted, with_provenance

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")


def said(result, word):
    return [line for line in caveats(result) if word in line]


def test_a_fallback_has_its_reason_once():
    assert said(planted(), "full forward passes") == []
    why = ["no keys and values"]
    twice = planted(why_hooks=why, ablations={"a": {"why_hooks": why[0]}, "b": {"why_hooks": None}})
    assert said(twice, "forward passes") == ["full forward passes in place of the fast path: no keys and values"]
    assert said(with_provenance(why_hooks="too far off"), "too far off")
    assert said(planted(path={"1.resid_post": "replay+hooks"}), "as requested")


def test_dropped_rows_have_reasons_and_equal_places_are_merged():
    p = {
        "rows_dropped": {"effect not finite": 3, "none of these": 0},
        "drawn": {"trained": {"pairs_dropped": {"position 0": 9}}, "random 0": {"pairs_dropped": {"position 0": 9}}},
        "left_out": {"boolq": {"7.resid_post": {"sinks": 0}, "15.resid_post": {"sinks": 1201}}},
        "tokens_left_out": {"language": {"sink": 391, "of": 9014}},
        "text": {"dropped": {"duplicate": 3671}},
        "atlas": {"standard": {"rows_not_finite": 2}},
        "chunks_halved": 1,
    }
    lines = caveats(planted(**p))
    assert "rows dropped: 3 (effect not finite)" in lines
    assert "pairs dropped (trained; random 0): 9 (position 0)" in lines
    assert "tokens left out (boolq, 15.resid_post): 1,201 (sinks)" in lines
    assert "tokens left out (language): 391 (sink), of 9,014" in lines
    assert "rows not finite (standard): 2" in lines
    assert any(line.startswith("chunks halved") for line in lines)
    assert not any("duplicate" in line or "none of these" in line for line in lines)


def test_noise_floor():
    result = measured()
    frame = result.frame
    below = rows = 0
    for _, some in frame.groupby([c for c in ("model", "layer", "point") if c in frame], observed=True):
        floor = np.percentile(some.kl[some.edit == "self"].abs(), 99)
        effects = some.kl[(some.edit != "self") & some.kl.notna()]
        below, rows = below + int((effects <= floor).sum()), rows + len(effects)
    (line,) = said(result, "noise floor")
    assert f"{rows:,} effects" in line and (f"{below:,} (" in line if below else "none of" in line)
    (line,) = said(planted(self_kl=2.0), "noise floor")
    assert line == "noise floor 2 nats; 1 (100.0%) of 1 effects lie at or below it"


def test_few_prompts_are_counted():
    (line,) = said(planted(), "fewer than 20")
    assert line.startswith("3 of 40 estimates") and "the least: 12" in line
    frame = pd.DataFrame(
        {"claim": ["direction"] * 2, "model": "trained", "value": 2.0, "low": 1.0, "high": 3.0, "n_prompts": [5, 40]}
    )
    (line,) = said(Specifications(frame, {"boolq": {"model": "m", "null_models": ["random 0"]}}), "fewer than 20")
    assert line.startswith("1 of 2 estimates") and "1 from fewer than 10 have none" in line
    (line,) = said(
        Specifications(frame.assign(n_effective=[5.0, 12.25]), {"boolq": {"model": "m", "null_models": ["random 0"]}}),
        "fewer than 20",
    )
    assert line.startswith("2 of 2 estimates are from fewer than 20 effective prompts (the least: 5)")


def test_missing_controls_and_half_precision():
    assert said(measured(), "no randomly initialised") and not said(
        with_provenance(null_models=["random 0"]), "no randomly initialised"
    )
    assert not said(planted(), "no randomly initialised")
    assert said(planted(placebo_share=0), "no placebo") and not said(planted(placebo_share=0.1), "no placebo")
    assert said(planted(dtype="bfloat16"), "bfloat16")


def test_differences_between_results():
    a = {"weights_sha256": "a" * 64, "versions": {"torch": "2.1"}, "dtype": "float32"}
    assert differences({"x": planted(**a), "y": planted(**a)}) == []
    b = a | {"weights_sha256": "b" * 64, "versions": {"torch": "2.2"}, "dtype": "bfloat16"}
    lines = differences({"x": planted(**a), "y": planted(**b)})
    assert lines[0] == f"weights of the model differ: a model {'a' * 12} in x; a model {'b' * 12} in y"
    assert [line.partition(" differ")[0] for line in lines] == ["weights of the model", "dtype", "version of torch"]
