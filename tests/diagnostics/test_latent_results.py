"""The table of a result, as a terminal and a notebook show it."""

import matplotlib.pyplot as plt
import pandas as pd

from diagnostics.latent_results import LatentResult
from diagnostics.statistics import Estimate
from tests.pages import read


class Found(LatentResult):
    """Two groups."""

    NAME, NOTE = "found", "what the numbers are"

    @property
    def groups(self):
        share = Estimate(0.5, 0.25, 0.75, 0.1, 9, 30)
        return [{"sae": "one", "share": share}, {"sae": "two", "share": "few"}]

    def plot(self):
        return plt.figure(num="the figure", figsize=(2, 1))


def found(**more):
    return Found(pd.DataFrame(), [], {"saes": {"one": 1, "two": 2}, "rows_dropped": {}, "why_hooks": None} | more)


def test_estimates_stand_with_their_intervals_and_only_what_was_dropped_is_told():
    assert found().saes == ["one", "two"] and list(found().figures()) == ["found"]
    plt.close("the figure")
    assert found().table().splitlines()[1:] == ["one 0.5 [0.25, 0.75]", "two              few", "what the numbers are"]
    said = found(rows_dropped={"effect not finite": 3}, why_hooks=["no keys"]).table().splitlines()[-2:]
    assert said == ["rows dropped: {'effect not finite': 3}", "full forward passes: ['no keys']"]
    page = read(found()._repr_html_())
    assert "0.5 [0.25, 0.75]" in "".join(page.text) and "what the numbers are" in page.text
