"""Cells, their controls and the audit against numpy formulas and planted cells."""

import numpy as np
import pytest
from scipy import stats

from diagnostics.patching import summary
from tests.diagnostics.patching.made import frame

PLANTED = {(2, 1, "END"): 0.4, (1, 0, "S2"): -0.2}
SMALL = {"pairs": 24, "layers": 3, "heads": 2, "labels": ("BOS", "S2", "END"), "first": 1}


@pytest.fixture(scope="module")
def made():
    return frame(PLANTED, controls=2, noise=0.02, scores=("gradient", "dla"), **SMALL)


def of(table, direction, layer, head, label):
    keep = (table["direction"] == direction) & (table["layer"] == layer) & (table["head"] == head)
    return table[keep & (table["label"] == label)]


def test_cell_summaries_match_numpy(made):
    found = summary.cells(made)
    assert len(found) == 2 * 3 * 2 * 2 and set(found["label"]) == {"S2", "END"}  # BOS: 0 exactly, not tested
    nulls = []
    for _, cell in found.iterrows():
        where = cell["direction"], cell["layer"], cell["head"], cell["label"]
        lines = of(made, *where).sort_values("pair")
        own, others = lines[lines["control"] == 0], [lines[lines["control"] == k] for k in (1, 2)]
        x, y = own["effect"].to_numpy(), own["total"].to_numpy()
        n = len(x)
        assert (cell["n"], cell["dose"]) == (24, 0.5)
        assert cell["share"] == pytest.approx(x.sum() / y.sum())
        assert cell["effect"] == pytest.approx(x.mean())
        without = np.array([np.delete(x, i).sum() / np.delete(y, i).sum() for i in range(n)])
        effective = np.abs(x).sum() ** 2 / (x**2).sum()
        assert cell["effective"] == pytest.approx(effective) and effective > 10
        far = stats.t.ppf(0.975, effective - 1) * np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
        assert (cell["share_low"], cell["share_high"]) == pytest.approx(
            (x.sum() / y.sum() - far, x.sum() / y.sum() + far)
        )
        control = np.mean([other["effect"].to_numpy() for other in others], axis=0)
        assert cell["control"] == pytest.approx(control.sum() / y.sum())
        assert cell["p"] == pytest.approx(stats.ttest_rel(x, control).pvalue, rel=1e-6)
        nulls += [(cell["direction"], abs(other["effect"].sum() / y.sum())) for other in others]
    for direction, family in found.groupby("direction"):
        assert family["null"].unique() == pytest.approx([max(null for one, null in nulls if one == direction)])
        assert family["q"].to_numpy() == pytest.approx(stats.false_discovery_control(family["p"].to_numpy()))


def test_planted_cells_beat_their_controls(made):
    found = summary.cells(made).set_index(["layer", "head", "label"])
    for (layer, head, label), share in PLANTED.items():
        cell = found.loc[(layer, head, label)]
        assert cell["beats"].all() and cell["share"].to_numpy() == pytest.approx([share] * 2, abs=0.02)


def test_no_test_without_controls_or_with_few_pairs(made):
    for some in (made[made["control"] == 0], made[made["pair"] < 9]):
        found = summary.cells(some)
        assert found["q"].isna().all() and not found["beats"].any()
    assert summary.cells(made[made["pair"] < 9])["share_low"].isna().all()


def test_few_false_discoveries_where_nothing_is_planted():
    beats = [summary.cells(frame(seed=seed, **SMALL | {"layers": 20}))["beats"].mean() for seed in range(10)]
    assert np.mean(beats) < 0.01


def test_audit_counts_missed_cells_and_wrong_signs(made):
    blind = made.copy()
    at = (blind["layer"] == 2) & (blind["head"] == 1) & (blind["label"] == "END") & (blind["control"] == 0)
    blind.loc[at, "gradient"] = 0.0  # sees nothing at the largest cell
    at = (blind["layer"] == 1) & (blind["head"] == 0) & (blind["label"] == "S2") & (blind["control"] == 0)
    blind.loc[at, "dla"] *= -1
    found = summary.cells(blind)
    lines = summary.audit(found).set_index(["direction", "score"])
    for direction in ("denoise", "noise"):
        family = found[found["direction"] == direction]
        for score, missed in (("gradient", 1), ("dla", 0)):
            line = lines.loc[(direction, score)]
            assert (line["cells"], line["top"], line["missed"]) == (12, 1, missed)
            assert line["spearman"] == pytest.approx(stats.spearmanr(family[score], family["share"]).statistic)
        counted = family[family["beats"]]
        wrong = int((np.sign(counted["dla"]) != np.sign(counted["share"])).sum())
        assert lines.loc[(direction, "dla")]["wrong_signs"] == wrong >= 1
