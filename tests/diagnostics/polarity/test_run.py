"""The protocols on small planted data: the bar of consolidation, what the table holds, files, and refusals."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diagnostics.polarity.result import Polarity
from diagnostics.polarity.run import polarity_protocols
from diagnostics.polarity.summary import AUROC, ERROR, ONE, at_equal_l0
from diagnostics.results.calls import reproduction
from diagnostics.results.caveats import differences
from interventions.errors import ResultError
from tests.reports import measured

SMALL = {
    "d_model": 10, "active": 1.5, "rhos": (-1.0, 0.0), "superpositions": (1.0, 1.5), "budgets": (2, 10), "ks": (1, 2), "l1s": (1.5, 0.8),
    "steps": 30, "batch": 64, "test_rows": 600, "seeds": 2,
}  # fmt: skip


@functools.cache
def small():
    return polarity_protocols(**SMALL)


def test_tied_signed_gate_uses_one_latent_per_planted_pair():
    """The bar: 90 % of the pairs without superposition."""
    found = polarity_protocols(
        **{
            "rhos": (-1.0,),
            "superpositions": (1.0,),
            "d_model": 12,
            "active": 2.0,
            "ks": (2,),
            "l1s": (0.9,),
            "seeds": 1,
        },
        **{"budgets": (12,), "steps": 250, "batch": 128, "test_rows": 2000},
    )
    ((one,), (abstopk,)) = (found.select(what=ONE, sae=sae) for sae in ("signed_gated_tied", "abstopk"))
    assert one["median"] >= 0.9 and abstopk["median"] >= 0.9
    frame = found.frame.set_index("selector")
    assert (frame.loc[["topk", "gated"], "consolidated"] == 0).all() and (frame["represented"] > 0.8).all()
    assert np.allclose(frame[["slope_plus", "slope_minus"]], 1, atol=0.05)
    auroc = {g["sae"]: g["median"] for g in found.select(what=AUROC)}
    assert auroc["signed_gated_tied"] > 0.9 and max(auroc["topk"], auroc["gated"]) < 0.6


def test_every_condition_is_in_the_tables():
    found = small()
    dial, rest = (found.frame[(found.frame["superposition"] == 1) == one] for one in (True, False))
    assert len(dial) == 2 * 2 * 4 * 2 and len(rest) == 2 * 2 * 2
    assert set(rest["selector"]) == {"abstopk", "signed_gated_tied"} and set(rest["pairs"]) == {15}
    latents = dial.drop_duplicates("selector").set_index("selector")["latents"]
    assert latents.to_dict() == {"abstopk": 10, "signed_gated_tied": 10, "topk": 20, "gated": 20}
    counts = found.anomalies.groupby(["read", "score"]).size().to_dict()
    assert counts == {
        **{(name, "deviation"): 4 for name in ("abstopk", "signed_gated_tied", "topk", "gated", "pca", "random")},
        **{(name, "error"): 2 for name in ("abstopk", "signed_gated_tied", "topk", "gated")},
    }
    exact = dial[dial["selector"].isin(["topk", "abstopk"])]
    assert (exact["l0"] <= exact["sparsity"]).all() and dial["error"].between(0, 2).all()


def test_conditions_do_not_depend_on_each_other():
    """Fewer seeds, correlations or budgets leave the others' numbers as they are."""
    fewer = polarity_protocols(**(SMALL | {"rhos": (0.0,), "superpositions": (1.0,), "seeds": 1}))
    some = small().frame
    some = some[(some["rho"] == 0) & (some["superposition"] == 1) & (some["seed"] == 0)].reset_index(drop=True)
    pd.testing.assert_frame_equal(fewer.frame, some)


def test_errors_are_compared_at_equal_l0():
    signed = pd.DataFrame({"l0": [4.0, 1.0], "error": [0.1 / 4, 0.1]})
    unsigned = pd.DataFrame({"l0": [2.0, 8.0], "error": [0.2 / 2, 0.2 / 8]})
    assert at_equal_l0(signed, unsigned) == pytest.approx((8**0.5, 0.5))
    assert np.isnan(at_equal_l0(signed, unsigned.assign(l0=[5.0, 8.0]))).all()


def test_result_roundtrip_and_complete_tables(tmp_path):
    result = small()
    assert "polarity.png" in result.write(tmp_path)
    back = Polarity.load(tmp_path)
    assert back.frame.equals(result.frame) and back.anomalies.equals(result.anomalies)
    said = result.table()
    assert all(title in said for title in ("A: polarity dial", "B: directional", "C: toy")) and ERROR in said
    assert all("no interval" in h.what for h in result.headlines())
    assert len(result.summary()) == len(result.groups)
    assert "planted antipodal" not in said and "antipodal pairs in 10 dimensions" in result._repr_html_()
    assert "polarity_protocols(" in reproduction(result, "here") and "d_model=10" in reproduction(result, "here")


def test_planted_and_model_results_are_not_compared():
    other = measured().provenance | {"versions": small().provenance["versions"]}
    assert differences({"planted": small(), "model": replace(measured(), provenance=other)}) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rhos": (0.5,)}, "rhos"),
        ({"budgets": (11,)}, "d_model, 10"),
        ({"superpositions": (0.1,)}, "two pairs"),
        ({"active": 12.0}, "up to 10"),
        ({"ks": ()}, "no sparsity"),
        ({"ks": (11,)}, "from 1 to 10"),
        ({"seeds": 0}, "at least one"),
        ({"test_rows": 3}, "never on alone in 3 test rows"),
    ],
)
def test_invalid_arguments_raise(asked, said):
    with pytest.raises(ResultError, match=said):
        polarity_protocols(**(SMALL | {"steps": 1} | asked))
