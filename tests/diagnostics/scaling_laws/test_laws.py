"""Lines of the fits: the largest width predicted from planted laws, forms compared, failures said."""

from typing import Any

import numpy as np
import pytest

from diagnostics.scaling_laws.fit import FLAT, JOINT, REDUCIBLE
from diagnostics.scaling_laws.laws import ERROR, LAST, law_rows
from tests.diagnostics.scaling_laws.test_fit import TRUE, K, N, law, noisy


def rows(y, n=N, k=K, draws=30) -> Any:
    return law_rows(n, k, lambda _: y, 0, draws, np.random.default_rng(0))


def test_the_largest_width_is_predicted_from_the_others():
    y = noisy(3, 0.003)
    found = rows(y)
    held = found[(found["part"] == "held out") & (found["what"] == "loss")]
    joint = held[held["form"] == JOINT]
    np.testing.assert_allclose(joint["value"], law()[N.max() == N], rtol=0.02)
    np.testing.assert_array_equal(joint["observed"], y[N.max() == N])
    assert ((joint["low"] < joint["observed"]) & (joint["observed"] < joint["high"])).sum() >= 3
    error = found[found["what"] == ERROR].set_index("form")["value"]
    assert error[JOINT] == pytest.approx(np.abs(np.log(joint["value"] / joint["observed"])).mean())
    assert error[JOINT] < 0.02 < error[LAST] < error[FLAT] and set(error.index) == {JOINT, REDUCIBLE, FLAT, LAST}
    last = held[held["form"] == LAST]
    np.testing.assert_array_equal(last["value"], y[np.unique(N)[-2] == N])


def test_the_held_out_width_does_not_enter_its_prediction():
    y = noisy(4)
    one, two = rows(y, draws=0), rows(np.where(N.max() == N, 3 * y, y), draws=0)
    held = [some[(some["part"] == "held out") & (some["what"] == "loss")] for some in (one, two)]
    np.testing.assert_array_equal(held[0]["value"], held[1]["value"])
    np.testing.assert_allclose(held[1]["observed"], 3 * held[0]["observed"])


def test_fit_lines_hold_parameters_and_irreducible_loss():
    found = rows(noisy(0, 0.002))
    own = found[(found["part"] == "fit") & (found["form"] == JOINT)]
    for name, true in TRUE.items():
        line = own[own["what"] == name].iloc[0]
        assert line["low"] <= line["value"] <= line["high"] and abs(line["value"] - true) < 0.5
    rest = own[own["what"] == "irreducible loss"].set_index("k")["value"]
    values = own.set_index("what")["value"]
    np.testing.assert_allclose(rest, np.exp(values["zeta"] + values["eta"] * np.log(rest.index)))


def test_failed_form_is_noted_and_others_are_fitted():
    keep = N < 300  # two widths; the held-out prediction is from one
    found = rows(law()[keep], N[keep], K[keep], draws=0)
    failed = found[found["what"] == "failed"]
    expected = [["fit", JOINT], ["held out", JOINT], ["held out", REDUCIBLE]]
    assert failed[["part", "form"]].to_numpy().tolist() == expected
    assert failed["note"].str.contains("do not determine").all()
    assert {REDUCIBLE, FLAT} <= set(found[found["what"] == "alpha"]["form"])
