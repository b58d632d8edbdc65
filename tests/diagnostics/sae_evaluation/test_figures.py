"""Figures of evaluations: each point stands where it belongs, far and missing values too."""

import functools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from diagnostics.figures.looks import DEAD, looks
from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.sae_evaluation.result import SAEEvaluation
from diagnostics.sampling.counted import ALL, NO_SINKS, QUARTILES
from interventions.errors import ResultError
from tests.diagnostics.drawn import caption, panels, series, titles

SITES = {"standard": "7.resid_post", "cosine": "7.resid_post", "late": "22.mlp_out"}
CORPORA = ("boolq", "sotu")


@functools.cache
def result(names: tuple[str, ...] = ("late", "standard", "cosine"), sink_filter: float | None = 10.0) -> SAEEvaluation:
    """A made-up result: each value depends on its place."""
    rng, lines, latents = np.random.default_rng(0), [], []
    for i, name in enumerate(names):
        site = SITES.get(name, "3.resid_post")
        layer, point = site.split(".")
        for corpus in CORPORA:
            for tokens in (ALL, NO_SINKS) if sink_filter else (ALL,):
                for q, quartile in enumerate(QUARTILES):
                    line = {"sae": name, "site": site, "layer": int(layer), "point": point, "corpus": corpus}
                    line |= {"tokens": tokens, "quartile": quartile, "d_sae": 50, "dead": 5, "dead_share": 0.1}
                    for j, measure in enumerate(MEASURES):
                        value = 0.9 - 0.1 * i - 0.02 * q - 0.001 * j - 0.3 * (tokens == ALL)
                        line |= {measure: value, f"{measure}_low": value - 0.02, f"{measure}_high": value + 0.03}
                        line[f"{measure}_se"] = 0.01
                    for of in ("", "kl_", "ce_"):
                        line |= {f"n_{of}tokens": 400, f"n_{of}prompts": 40}
                    lines.append(line)
            table = pd.DataFrame({"sae": name, "corpus": corpus, "latent": np.arange(50), "fired": np.arange(50) // 5})
            aligned = np.where(np.arange(50) % 2, 1.0, 0.1) + 0.05 * np.sin(np.arange(50))
            table["alignment"] = aligned
            table["cosine"] = aligned * (0.8 if name == "late" else 1.0)
            table["exponent"] = rng.normal(0.25, 0.05, 50) if name == "cosine" else np.nan
            latents.append(table)
    provenance = {
        "model": "some-model",
        "model_note": "a note",
        "norm": "RMSNorm",
        "dtype": "float32",
        "saes": {name: {} for name in names},
        "sites": sorted(set(SITES.values())),
        "texts": {c: {"name": f"{c}, held out", "prompts": 40, "tokens": 4000} for c in CORPORA},
        "sink_filter": sink_filter,
        "splice_sinks": False,
        "null_models": [],
        "left_out": {},
        "why_hooks": None,
    }
    return SAEEvaluation(pd.DataFrame(lines), [[1]], provenance, pd.concat(latents, ignore_index=True))


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_quartiles_are_plotted_with_intervals_per_sae():
    run = result()
    figure = run.plot()
    for ax, (corpus, measure) in zip(figure.axes, [(c, m) for c in CORPORA for m in ("fve", "kl_score")], strict=True):
        assert corpus in ax.get_title(loc="left")
        # by depth, so `late`, which was given first, comes last
        assert [t.get_text() for t in figure.axes[-1].get_xticklabels()] == ["standard", "cosine", "late"]
        found = series(ax)
        assert len(found) == 6
        for place, name in enumerate(("standard", "cosine", "late")):
            groups = run.select(sae=name, corpus=corpus, tokens=NO_SINKS)
            (first, overall), (second, by_quartile) = found[2 * place : 2 * place + 2]
            assert {to_hex(c.lines[0].get_color()).upper() for c in (first, second)} == {looks(run.names)[name][0]}
            wanted = [[g[measure].value, g[measure].low, g[measure].high] for g in groups]
            np.testing.assert_allclose(np.vstack([overall, by_quartile])[:, 1:], wanted)
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["block 7", "block 22, mlp_out"]


def test_all_tokens_can_be_shown():
    run = result()
    assert series(run.plot(ALL).axes[0])[0][1][0, 1] == run.select(sae="standard", tokens=ALL)[0]["fve"].value
    unfiltered = result(sink_filter=None)
    assert "every token" in caption(unfiltered.plot())
    with pytest.raises(ResultError, match="no tokens 'no sinks'"):
        unfiltered.plot(NO_SINKS)


def test_outliers_do_not_compress_the_axis():
    run = result()
    frame = run.frame.copy()
    frame.loc[(frame.sae == "late") & (frame.quartile == "Q4"), ["fve", "fve_low", "fve_high"]] = [-184, -190, -180]
    figure = SAEEvaluation(frame, run.tokens, run.provenance, run.latents).plot()
    low, high = figure.axes[0].get_ylim()
    assert low > -1 and high < 1.2
    assert any("−184" in t.get_text() for t in figure.axes[0].texts)


def test_missing_values_are_left_out():
    run = result()
    frame = run.frame.copy()
    columns = [c for c in frame if c.startswith(("fve", "kl_score"))]
    frame.loc[frame.sae == "cosine", [c for c in columns if c.endswith(("low", "high"))]] = np.nan
    frame.loc[(frame.sae == "cosine") & (frame.quartile == "Q2"), columns] = np.nan
    found = series(SAEEvaluation(frame, run.tokens, run.provenance, run.latents).plot().axes[0])
    assert len(found[3][1]) == 3
    assert np.ptp(found[2][1][:, 2:], axis=1).max() == 0


def test_histograms_count_every_latent_once():
    run = result()
    figure = run.figures()["sae_alignment"]
    for ax, name in zip(panels(figure), run.names, strict=True):
        heights = {}
        for patch in ax.patches:
            if hasattr(patch, "get_width") and patch.get_width() > 0:
                heights.setdefault(to_hex(patch.get_facecolor()).upper(), []).append(patch.get_height())
        colour = looks(run.names)[name][0]
        assert sum(heights[colour]) == 45
        assert sum(heights[to_hex(DEAD).upper()]) == 5
        assert ax.get_title(loc="left") == f"{name} ({SITES[name]})"
        facts = next(g for g in run.alignments if g["sae"] == name)
        text = ax.texts[0].get_text()
        assert text.startswith("45 of 50 live\n")
        assert f"below 0.5: {facts['alignment < 0.5']:.1%}" in text
        assert f"bimodality {facts['alignment bimodality']:.2f}" in text
        outlines = [p for p in ax.patches if not hasattr(p, "get_width")]
        assert len(outlines) == (name == "late")  # where the cosine is another number


def test_only_cosine_saes_have_exponents():
    run = result()
    figure = run.figures()["sae_exponents"]
    assert titles(figure) == ["cosine (7.resid_post)"] and sum(p.get_height() for p in figure.axes[0].patches) == 50
    facts = next(g for g in run.alignments if g["sae"] == "cosine")
    said = f"45 of 50 live\nmean {facts['exponent']:.3f}\nSD {facts['exponent sd']:.3f}"
    assert figure.axes[0].texts[0].get_text() == said
    assert set(result(("standard", "late")).figures()) == {"sae_evaluation", "sae_alignment"}


@pytest.mark.parametrize("names", [tuple(f"results/saes/number-{i}" for i in range(9)), ("standard",)], ids=len)
def test_figures_draw_for_one_or_many_saes(names):
    for figure in result(names).figures().values():
        figure.draw_without_rendering()
