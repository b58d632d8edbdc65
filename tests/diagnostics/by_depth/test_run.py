"""Figures by depth draw their tables, keep what cannot be compared apart, and say what they leave out."""

import functools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from diagnostics.by_depth.panels import LINE
from diagnostics.by_depth.run import DepthFigures, depth_figures, found_results
from diagnostics.figures.looks import SAE_LOOKS, UNTRAINED, looks
from diagnostics.saved import PLANS
from interventions.errors import ResultError
from interventions.files import write_csv
from tests.diagnostics.drawn import series
from tests.diagnostics.made_results import (
    EVERY,
    SAES,
    atlas,
    direction,
    dose,
    estimate,
    evaluation,
    projections,
    unit_norm,
    wins,
)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@functools.cache
def every() -> DepthFigures:
    return depth_figures({place: make() for place, make in EVERY.items()})


def flat(words: str) -> str:
    return " ".join(words.split())


@functools.cache
def drawn(name: str):
    """Each figure of `every()`, drawn once for all tests."""
    return every().figures[name].plot()


def panels(name: str) -> dict[tuple[str, str], object]:
    """Axes by (row, panel), in the order in which they stand."""
    figure = every().figures[name]
    rows = list(dict.fromkeys(figure.table["row"]))
    columns = [panel for panel in figure.plan.panels if (figure.table["panel"] == panel).any()]
    return dict(zip([(row, column) for row in rows for column in columns], drawn(name).axes, strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_plotted_points_match_the_table(name):
    assert list(every().figures) == list(PLANS)
    figure = every().figures[name]
    for (row, panel), ax in panels(name).items():
        own = figure.table.loc[(figure.table["row"] == row) & (figure.table["panel"] == panel)]
        found = {container.get_label(): points[:, 1:] for container, points in series(ax)}
        for key, line in own.groupby(LINE, sort=False):
            shown = line.loc[line["state"] == "value"].sort_values("layer", kind="stable")
            expected = shown[["value", "low", "high"]].to_numpy(float, copy=True)
            expected[:, 1:] = np.where(np.isnan(expected[:, 1:]), expected[:, :1], expected[:, 1:])
            shown = found.pop("|".join(map(str, key)))
            np.testing.assert_allclose(shown, expected, err_msg=f"{name} {row} {panel} {key}")
            marks = [m for m in ax.lines if m.get_label() == f"no effect|{'|'.join(map(str, key))}"]
            assert sum(len(mark.get_xdata()) for mark in marks) == (line["state"] == "no effect").sum()
        assert not found, "points that are not in the table"
        assert ax.get_ylabel() and ax.get_title(loc="left")


def test_tables_hold_the_statistics_of_the_results():
    table = every().figures["direction_norm_kl"].table.set_index(["row", "series", "network", "layer"])
    own = {(g["context"], edit, g["model"], g["layer"]): found["median_kl"]
           for g in direction().groups for edit, found in g["edits"].items()}  # fmt: skip
    for place, line in table.iterrows():
        assert (line["value"], line["low"], line["high"]) == (own[place].value, own[place].low, own[place].high)
        assert line["n"] == 100
    assert set(own) - set(table.index) == {p for p in own if p[1].startswith("placebo") and p[2] != "trained"}
    rates = every().figures["win_rate"].table
    one = rates.query("row == 'in_place' and panel == '2' and role == 'placebo_token' and layer == 7")
    assert one["value"].tolist() == [estimate("placebo_token", 2, "7/standard", "in_place").value]
    assert every().figures["direction_norm_kl"].table["n_effective"].isna().all()  # of these made-up estimates
    doses = every().figures["dose_response"].table
    assert doses["setting"].unique().tolist() == ["resid_post, dose: 0.25"], "the dose nearest to .2"


def test_bounds_have_open_markers_and_floor_effects_are_marked():
    ratio = every().figures["direction_norm_ratio"]
    states = ratio.table.groupby(["panel", "layer"])["state"].unique()
    assert states["direction ÷ norm", 4].tolist() == ["lower bound"]
    assert states["norm ÷ placebo_norm", 4].tolist() == ["no effect"]
    ax = panels("direction_norm_ratio")["", "direction ÷ norm"]
    white = [line for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [y for line in white for y in line.get_ydata()] == [5000.0] * 4 and len(ax.texts) == 4
    for words in ("Arrows: lower bounds", "within 10 noise floors"):
        assert words in flat(ratio.caption)


def test_unidentified_exponents_are_counted_and_not_drawn():
    figure = every().figures["norm_exponent"]
    lost = figure.table.loc[figure.table["state"] == "not identified"]
    assert set(lost["layer"]) == {7} and set(lost["role"]) == {"placebo_token"}
    assert f"{len(lost)} of {len(figure.table)} values (not identified)" in flat(figure.caption)


def test_an_sae_has_one_colour_in_every_figure():
    for name in ("win_rate", "norm_exponent", "sae_evaluation", "sae_latents", "atlas_effects"):
        for ax in panels(name).values():
            for container in ax.containers:
                sae = container.get_label().split("|")[0]
                colour = to_hex(container.lines[0].get_color()).upper()
                assert colour == looks([sae])[sae][0] == SAE_LOOKS[sae.split("-")[0]][0]
    alone = evaluation().plot()
    colours = {to_hex(c.lines[0].get_color()).upper() for c in alone.axes[0].containers}
    assert colours == {colour for colour, _ in looks(list(SAES)).values()}


@pytest.mark.parametrize("name", PLANS)
def test_captions(name):
    words = flat(every().figures[name].caption)
    n = {"sae_evaluation": "n = 24 tokens", "sae_latents": "n = 45 live latents", "atlas_effects": "n = 100 ablations"}
    for part in (n.get(name, "n = 100"), "some-model (a note; float32; huggingface)", "‖x‖ > 10 × median"):
        assert part in words, (part, words)
    assert ("seed 3" in words) != name.startswith("sae_") and ("95 %" in words) == (name != "sae_latents")
    assert drawn(name).get_supxlabel() == (said := every().figures[name].caption)
    assert len(said.splitlines()) <= (2 if drawn(name).get_size_inches()[0] >= 8 else 3)


def test_several_models_are_lines_of_one_panel():
    second = {"model": "other-model", "weights_sha256": "9", "n_layers": 12, "wrapper": "nnsight"}
    found = depth_figures({"a": unit_norm(), "b": unit_norm(**second, text={"name": "another text", "sha256": "8"})})
    figure = found.figures["unit_norm"]
    names = ["some-model, huggingface, some text", "other-model, nnsight, another text"]
    assert figure.table["label"].unique().tolist() == names and not found.notes
    words = flat(figure.caption)
    for part in (f"Runs: {'; '.join(names)}.", "a note; float32", "seed 3", "24 prompts"):
        assert part in words, words
    several = figure.plot()
    assert {ax.get_xlabel() for ax in several.axes[-2:]} == {"depth l / (L − 1), output of block l edited"}
    legend = [text.get_text() for text in several.legends[0].get_texts()]
    assert legend[:4] == ["norm forced to 1", "turned by the same distance", *names]
    lines = {c.get_label(): c.lines[0] for c in several.axes[0].containers}
    first, other = (lines[f"unit_norm|{run}|main|trained"] for run in "ab")
    assert first.get_color() == other.get_color() and first.get_marker() != other.get_marker()
    np.testing.assert_allclose(other.get_xdata(), [1 / 11, 4 / 11], atol=0.05)
    assert lines["unit_norm|a|main|random 0"].get_color() == UNTRAINED


def test_runs_differing_only_in_depth_share_a_line():
    shallow, deep = evaluation(("7/standard",)), evaluation(("15/standard", "15/cosine"))
    table = depth_figures({"a": shallow, "b": deep}, ["sae_evaluation"]).figures["sae_evaluation"].table
    assert table["run"].unique().tolist() == ["a"] and set(table["label"]) == {""}
    assert table.loc[table["series"] == "standard", "layer"].unique().tolist() == [7, 15]
    apart = depth_figures({"a": shallow, "b": evaluation(("7/standard",), sink_filter=None)}, ["sae_latents"])
    assert sorted(apart.figures["sae_latents"].table["label"].unique()) == [
        "no sink filter",
        "‖x‖ > 10 × median left out",
    ]


def test_runs_with_equal_settings_are_named_by_their_folders():
    other = unit_norm()
    other.groups[0]["rotation"] = estimate("another draw of tokens")
    found = depth_figures({"a": unit_norm(), "b": other, "c": unit_norm(threads=4)})
    assert found.figures["unit_norm"].table["label"].unique().tolist() == ["a", "b"]
    assert found.notes == ["c: the same result as a, drawn once"]


def test_saes_of_one_kind_at_one_depth_keep_their_names():
    found = depth_figures({"a": evaluation(("15/a/mine", "15/b/mine", "15/cosine"))}, ["sae_latents"])
    assert set(found.figures["sae_latents"].table["series"]) == {"15 a mine", "15 b mine", "cosine"}


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        (dose(horizon=8), ["resid_post, dose: 0.25", "resid_post, horizon: 8, dose: 0.25"]),
        (
            projections(sampling="active"),
            ["resid_post, sampling: stratified, edit: zero", "resid_post, sampling: active, edit: zero"],
        ),
    ],
)
def test_different_settings_get_separate_figures(other, settings):
    first = dose() if other.NAME == "dose_response" else projections()
    found = depth_figures({"a": first, "b": other})
    assert [figure.table["setting"].unique().tolist() for figure in found.figures.values()] == [[s] for s in settings]
    assert any("drawn separately, since settings differ" in note and settings[1] in note for note in found.notes)
    assert next(iter(found.figures)) in ("dose_response", "norm_exponent_sampling-stratified")
    assert list(found.figures)[1] in ("dose_response_horizon-8", "norm_exponent_sampling-active")
    assert all(flat(f.caption).count(f"at {s}.") for f, s in zip(found.figures.values(), settings, strict=True))


def test_missing_figures_and_panels_have_notes(tmp_path):
    found = depth_figures({"a": unit_norm(), "b": atlas()}, ["unit_norm"])
    assert list(found.figures) == ["unit_norm"]
    assert "b: a CausalAtlas has no figure by depth of those asked for (unit_norm)" in found.notes
    without = projections()
    for g in without.groups:
        g["exponents"].pop("interventional")
    note, other = depth_figures({"a": without}).notes
    assert note == "norm_exponent: no values for the panel 'same token rescaled' in these results"
    assert other == "norm_exponent: no values for the panel 'rescaled less placebo' in these results"
    assert f"note: {note}" in depth_figures({"a": without}).table()
    with pytest.raises(ResultError, match="no figure 'depth'; known: direction_norm_kl"):
        depth_figures({"a": wins()}, ["depth"])
    with pytest.raises(ResultError, match="nothing to draw by depth: a: a CausalAtlas has no figure"):
        depth_figures({"a": atlas()}, ["unit_norm"])
    with pytest.raises(ResultError, match="nothing to draw by depth: no results were given"):
        depth_figures({})
    with pytest.raises(ResultError, match="no result in"):
        found_results([tmp_path])


def test_the_same_results_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = depth_figures({"a": evaluation()}, ["sae_latents"]).write(tmp_path / name)
    assert files == [f"sae_latents.{end}" for end in ("png", "svg", "pdf", "csv")]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert b"/FontFile2" in (tmp_path / "a" / "sae_latents.pdf").read_bytes(), "letters stay letters"


def test_formulas_are_quoted_in_csv(tmp_path):
    cells = ['=HYPERLINK("http://x")', "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "plain", "a=b", "", None]
    table = pd.DataFrame({"=run": cells, "low": [-1.5, float("nan"), *range(-8, 0)], "layer": -1, "kind": "=k"})
    table["kind"] = table["kind"].astype("category")
    write_csv(tmp_path / "x.csv", table)
    found = pd.read_csv(tmp_path / "x.csv", keep_default_na=False, na_values={"low": [""]})
    assert list(found) == ["'=run", "low", "layer", "kind"]
    assert list(found["'=run"][:4]) == ["'" + cell for cell in cells[:4]]
    assert list(found["'=run"][6:]) == ["plain", "a=b", "", ""]
    assert all(cell.startswith("'") for cell in found["'=run"][4:6]) and set(found["kind"]) == {"'=k"}
    np.testing.assert_array_equal(found["low"], table["low"])
    assert set(found["layer"]) == {-1}
    assert "=run" in table and table["=run"][0].startswith("=")  # the table itself stays as it is
