"""Contract of every figure of every kind of result: titles, captions, colours, legends, drawn numbers, and names shown literally."""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import is_color_like, to_hex
from matplotlib.text import Text

from diagnostics.auto_interpretation.run import autointerp
from diagnostics.by_depth.run import depth_figures
from diagnostics.causal_dimension.run import causal_dimensionality
from diagnostics.coalitions.run import shapley
from diagnostics.dictionary_comparison.run import compare_dictionaries
from diagnostics.dose.run import dose_response
from diagnostics.edges.circuits import faithfulness
from diagnostics.edges.run import edge_patching
from diagnostics.figures import looks as style
from diagnostics.figures.looks import legend_label, styled
from diagnostics.latent_edits.concentration import causal_concentration
from diagnostics.latent_edits.interactions import interactions
from diagnostics.latent_edits.polarities import polarity_effects
from diagnostics.latent_edits.sparsity import ablation_sparsity
from diagnostics.latent_edits.steering import latent_steering
from diagnostics.latent_edits.substitution import atom_substitution
from diagnostics.patching.run import activation_patching
from diagnostics.polarity.census import bipolar_census
from diagnostics.polarity.run import polarity_protocols
from diagnostics.probe_perturbation.run import perturb_probes
from diagnostics.saved import KINDS
from diagnostics.statistics.estimate import Estimate
from diagnostics.statistics.tables import from_sums, mean_of
from diagnostics.token_patterns.run import n2g
from diagnostics.win_rate.run import win_rate_report
from interventions.models.wrapping import wrap
from sae_models.selectors import AbsTopK
from tests.diagnostics import made_results
from tests.diagnostics.atlas import test_run as test_atlas
from tests.diagnostics.concept_ablation import test_figures as test_ablation_plots
from tests.diagnostics.dictionary_comparison import test_run as test_dictionary_comparison
from tests.diagnostics.direction_vs_norm import test_figures as test_direction_plots
from tests.diagnostics.disentanglement import test_run as test_disentanglement
from tests.diagnostics.drawn import caption, panels, series
from tests.diagnostics.patching.test_cells import given
from tests.diagnostics.projections import test_run as test_projections
from tests.diagnostics.sae_evaluation import test_figures as test_sae_plots
from tests.diagnostics.scaling_laws import test_run as test_scaling
from tests.diagnostics.sparse_probing import test_run as test_sparse_probing
from tests.diagnostics.specifications import test_run as test_specification
from tests.diagnostics.unit_norm import test_run as test_unit_norm
from tests.diagnostics.whole_dictionary import test_run as test_dictionary
from tests.planted import planted_model
from tests.tiny import D_MODEL, prompts, tiny_model

NAMES = ("_hidden$x_{$", 'b<i>&"$\\frac{$', "$$c^{%$_", "\\$d\u200f\u202e_{}^", "__", "$e$")
"""Of SAEs and directions: half a formula, markup, right-to-left marks, names that matplotlib leaves out of legends."""
MODEL, TEXT = "m<b>$_{$ & _", "_t$\\sum_$<"
PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(26)))


pytestmark = pytest.mark.filterwarnings("ignore:an interval from", "ignore:in . of . pairs the right answer")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The same value with other names in keys, values and columns of tables."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, pd.DataFrame):
        found = value.copy()
        for column in found:
            if not pd.api.types.is_numeric_dtype(found[column]):
                kept = found[column].astype(object).map(lambda x: renamed(x, names))
                found[column] = pd.Categorical(kept, pd.unique(kept)) if found[column].dtype == "category" else kept
        return found
    if isinstance(value, Mapping):
        return {renamed(k, names): renamed(v, names) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(renamed(v, names) for v in value)
    return value


def poisoned(result: Any) -> tuple[Any, list[str]]:
    """A result whose SAEs, model and text have other names, and the names of its SAEs."""
    p = result.provenance
    known = list(p.get("saes", {}))
    names = dict(zip(known, NAMES, strict=False))
    fields = [f.name for f in dataclasses.fields(result) if f.name not in ("tokens", "provenance")]
    p = renamed(p, names) | {"model": MODEL, "model_note": TEXT}
    if isinstance(p.get("text"), dict):
        p["text"] = p["text"] | {"name": TEXT}
    changed = {name: renamed(getattr(result, name), names) for name in fields}
    return dataclasses.replace(result, provenance=p, **changed), list(names.values())


@functools.cache
def planted() -> tuple[Any, Any]:
    return planted_model()


def signed(sae: Any) -> Any:
    sae.selector = AbsTopK(4)
    return sae


def steered() -> Any:
    hf, sae = planted()
    how: dict[str, Any] = {"latents": [0, 4], "n_tokens": 30, "coefficients": (0.5, 3.0), "min_active": 1}
    return latent_steering(hf, PROMPTS, {"3/standard": sae}, **how)


def doses() -> Any:
    given = {name: torch.randn(D_MODEL, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES[:3])}
    return dose_response(tiny_model("llama"), PROMPTS, layers=(1, 4), tokens=40, doses=(0.1, 0.5), directions=given)


def compared() -> Any:
    saes = {f"_{NAMES[i]}": sae for i, sae in enumerate(test_dictionary_comparison.saes().values())}
    model, more = tiny_model("llama"), test_dictionary_comparison.SETTINGS
    return compare_dictionaries(model, test_dictionary_comparison.PROMPTS, saes, **more)


def patched_model():
    return wrap(tiny_model("llama"), name=MODEL)


def crossed() -> Any:
    """Texts of two attributes."""
    some = test_sparse_probing.labelled("crossed", "abcd", 24)
    kinds = dict(zip("abcd", ("m/p", "m/q", "n/p", "n/q"), strict=True))
    return dataclasses.replace(some, labels=[kinds[label] for label in some.labels])


RESULTS: dict[str, Callable[[], Any]] = {
    "direction_norm": test_direction_plots.result,
    "dose_response": doses,
    "unit_norm": test_unit_norm.result,
    "specification": test_specification.curve_of_two,
    "sae_evaluation": test_sae_plots.result,
    "projections": test_projections.found,
    "win_rate": lambda: win_rate_report({"one": poisoned(test_projections.found())[0]}),
    "atlas": test_atlas.found,
    "dictionary_effects": test_dictionary.whole,
    "feature_ablation": test_ablation_plots.result,
    "sparse_probing": test_sparse_probing.result,
    "dictionary_comparison": compared,
    "interactions": lambda: interactions(planted()[0], PROMPTS, {"3/standard": planted()[1]}, n_tokens=30, per_token=5),
    "causal_concentration": lambda: causal_concentration(planted()[0], PROMPTS, {"3/standard": planted()[1]}, n_tokens=20),
    "latent_steering": steered,
    "atom_substitution": lambda: atom_substitution(
        planted()[0], PROMPTS, {"3/standard": planted()[1]}, latents=3, tokens_per_latent=10
    ),
    "ablation_sparsity": lambda: ablation_sparsity(
        planted()[0], PROMPTS, {"3/standard": planted()[1]}, latents=2, tokens_per_latent=10, horizon=2
    ),
    "polarity_effects": lambda: polarity_effects(planted()[0], PROMPTS, {"3/standard": signed(planted()[1])}, latents=2, tokens_per_latent=2),
    "bipolar_census": lambda: bipolar_census(planted()[0], PROMPTS, {"3/standard": signed(planted()[1])}, min_active=5),
    "causal_dimension": lambda: causal_dimensionality(
        planted()[0], PROMPTS, layers=(1, 3), tokens=30, saes={"3/standard": planted()[1]}, spans=(2, 6), null_seeds=1
    ),
    "token_patterns": lambda: n2g(
        planted()[0], PROMPTS, {"3/standard": planted()[1]}, latents=10, examples=3, longest=4, min_active=3, pad=1
    ),
    "autointerp": lambda: autointerp(
        planted()[0], PROMPTS, {"3/standard": planted()[1]}, latents=10, top=3, more=1, snippets=3, width=3, min_active=3
    ),
    "activation_patching": lambda: activation_patching(patched_model(), given(), floor=0.0, layers=(1, 4), scores=("gradient",)),
    "edge_patching": lambda: edge_patching(patched_model(), given(), floor=0.0, receivers=["4.q.1", "logits"]),
    "faithfulness": lambda: faithfulness(patched_model(), list(given()), [(1, 2)], n_random=3),
    "shapley": lambda: shapley(patched_model(), list(given()), [(1, 2), (3, 0)]),
    "scaling_laws": test_scaling.result,
    "disentanglement": test_disentanglement.result,
    "probe_perturbation": lambda: perturb_probes(
        test_sparse_probing.model(), [test_sparse_probing.SETS[1]], test_sparse_probing.saes(), ks=(1, 4), seeds=2, crossed=crossed()
    ),
    "polarity": lambda: polarity_protocols(d_model=6, active=1.5, budgets=(2, 6), steps=5, batch=32, test_rows=500, seeds=2),
}  # fmt: skip


UNNAMED = ("scaling_laws",)
"""Kinds whose figures show SAEs by their width and k, not by name."""
PLANTED = ("polarity",)
"""Kinds without a model and a text."""


def words(figure: Any) -> str:
    """Everything that is written in a figure, drawn, without white space."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert not any("mathdefault" in t.get_text() and not t.get_parse_math() for t in shown)  # powers of ten are set
    return "".join("".join(text.get_text() for text in shown).split())


@functools.cache
def drawn(kind: str) -> Any:
    """A result with unusual names, the names that figures must show, its figures, and the text in each."""
    result: Any = RESULTS[kind]()
    given: list[str] = list(NAMES[:3]) if kind == "dose_response" else []
    if kind not in ("specification", "win_rate", *PLANTED):
        result, given = (found := poisoned(result))[0], given + found[1] * (kind not in UNNAMED)
    figures = result.figures()
    said = {name: words(figure) for name, figure in figures.items()}
    assert figures
    return result, given, figures, said


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_names_are_shown_literally(kind):
    result, given, _, said = drawn(kind)
    if kind not in ("specification", "win_rate", *PLANTED):
        assert all("".join(MODEL.split()) in text for text in said.values())
    for name in given:
        assert any(name in text for text in said.values()), name
    page = result._repr_html_()
    assert "<i>" not in page and "m<b>" not in page
    assert isinstance(result.table(), str) and len(result.summary())


@every_kind
def test_every_panel_has_a_title_and_axis_labels(kind):
    """Its own, or those of panels that share its axis, row or column."""
    for name, figure in drawn(kind)[2].items():
        shown = [ax for ax in panels(figure) if ax.get_subplotspec() is not None]
        for ax in shown:
            place = ax.get_subplotspec()
            row = [a for a in shown if a.get_subplotspec().rowspan == place.rowspan]
            column = [a for a in shown if a.get_subplotspec().colspan == place.colspan]
            below, beside = ax.get_shared_x_axes().get_siblings(ax), ax.get_shared_y_axes().get_siblings(ax)
            titled = any(a.get_title(loc="left") or a.get_legend() for a in (*row, *column))
            assert titled or figure.get_suptitle(), name
            assert any(a.get_ylabel() or a.get_yticklabels() for a in (*row, *beside)), name
            assert any(a.get_xlabel() or a.get_xticklabels() for a in (*column, *below)), name


@every_kind
def test_captions_state_provenance_in_two_lines(kind):
    """Figures narrower than 8 inches may take a third line."""
    result, _, figures, _ = drawn(kind)
    p = result.provenance
    p = next(iter(p.values())) if kind in ("specification", "win_rate") else p
    for name, figure in figures.items():
        lines = figure.get_supxlabel().splitlines()
        said = caption(figure)
        assert len(lines) <= (2 if figure.get_size_inches()[0] >= 8 else 3), (name, lines)
        if kind in PLANTED:
            assert said.startswith(f"Planted {p['planted']}, ")
            continue
        assert said.startswith(f"{p['model']} ({p['model_note'] or p['norm']}; {p['dtype']}), ")
        assert "left out" in said or "sink filter" in said
        if "seed" in p and kind != "sae_evaluation":
            assert f"seed {p['seed']}" in said


@every_kind
def test_colours_are_those_of_the_style(kind):
    known = {to_hex(colour) for colour in colours_in(vars(style))} | {to_hex("black"), to_hex("white"), to_hex("0.8")}
    for name, figure in drawn(kind)[2].items():
        for ax in panels(figure):
            if ax.get_label() == "<colorbar>":
                continue
            found = {to_hex(line.get_color()) for line in ax.lines} | {to_hex(text.get_color()) for text in ax.texts}
            found |= {to_hex(patch.get_facecolor()) for patch in ax.patches if patch.get_fill()}
            group: Any
            for group in ax.collections:
                if group.get_array() is None:
                    found |= {to_hex(colour) for colour in (*group.get_facecolor(), *group.get_edgecolor())}
            assert found <= known, (name, found - known)


def colours_in(value: Any) -> set[str]:
    """Every colour within nested dictionaries and tuples."""
    if isinstance(value, str):
        return {value} if len(value) > 1 and is_color_like(value) else set()
    if isinstance(value, Mapping):
        value = [some for key, some in value.items() if not str(key).startswith("__")]
    return set().union(*map(colours_in, value)) if isinstance(value, (list, tuple)) else set()


@every_kind
def test_legends_name_each_series_once(kind):
    for name, figure in drawn(kind)[2].items():
        legends = [*figure.legends, *(found for ax in panels(figure) if (found := ax.get_legend()))]
        for found in legends:
            labels = [text.get_text() for text in found.get_texts()]
            assert labels and len(set(labels)) == len(labels), (name, labels)


def numbers(value: Any) -> set[float]:
    """Every number within nested estimates, tables, dictionaries and lists."""
    if isinstance(value, Estimate):
        return {value.value, value.low, value.high}
    if isinstance(value, pd.DataFrame):
        return numbers(value.select_dtypes("number").to_numpy(float).ravel().tolist())
    if isinstance(value, (int, float)):
        return {float(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return set().union(*map(numbers, value)) if isinstance(value, (list, tuple)) else set()


def on_log_axes(frame: pd.DataFrame) -> list[Any]:
    """Means of what is drawn on log axes have intervals of their logarithm there."""
    parts = [some for _, some in frame.groupby(["sae", "condition", "coefficient"], observed=True)]
    return [mean_of(some, name, "log") for some in parts for name in ("kl", "probability")]


GROUPS: dict[str, Callable[[Any], Any]] = {
    "specification": lambda result: result.frame,
    "win_rate": lambda result: result.frame,
    "feature_ablation": lambda result: [result.groups, *map(result.equal_effects, result.forms), recovered(result)],
    "latent_steering": lambda result: [result.groups, on_log_axes(result.frame)],
    "causal_dimension": lambda result: [result.groups, result.span_groups],
    "interactions": lambda result: [
        from_sums(some, ["rms_interaction", "bottom"], lambda a, b: a / b, "log") for some in binned(result.frame)
    ],
}


def recovered(result: Any) -> list[Any]:
    """Ratios of means over concepts, and what is recovered when only N latents are kept."""
    means = [*result.means("probe"), *result.means("kl")]
    found = [[c.recovered(k, part) for k in range(len(c.counts)) for part in (0, 1)] for c in means if c.arm == "keep"]
    return [*found, *([c.log_ratio(k) for k in range(len(c.counts))] for c in means)]


def binned(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Pairs by kind and half decade of the size of their single effects."""
    frame = frame.assign(bottom=frame["rms_i"] + frame["rms_j"])
    place = np.floor(2 * np.log10(frame["bottom"].where(frame["bottom"] > 0)))
    return [some for _, some in frame.groupby(["sae", "kind", place], observed=True)]


@every_kind
def test_plotted_points_and_intervals_come_from_the_result(kind):
    """Values and both ends, as numbers or in per cent; a missing end equals the value."""
    result, _, figures, _ = drawn(kind)
    known = np.array(sorted(x for x in numbers(GROUPS.get(kind, lambda r: r.groups)(result)) if np.isfinite(x)))
    known = np.unique(np.concatenate([known, 100 * known]))
    seen = 0
    for name, figure in figures.items():
        for ax in panels(figure):
            for _, points in series(ax):
                found = points[:, 1:][np.isfinite(points[:, 1:])]
                near = known[np.abs(found[:, None] - known).argmin(1)] if len(found) else found
                np.testing.assert_allclose(found, near, rtol=1e-7, atol=1e-12, err_msg=name)
                seen += len(found)
    maps = ("activation_patching", "edge_patching")
    assert seen or kind in (
        "specification",
        "causal_concentration",
        "projections",
        "interactions",
        "dictionary_effects",
        *PLANTED,
        *maps,
    )


def test_figures_by_depth_show_names_literally():
    """Names of SAEs, models and folders."""
    saes = [f"{layer}/{name}" for layer in (7, 15) for name in NAMES[:3]]
    other = made_results.unit_norm()
    other.groups[0]["rotation"] = made_results.estimate("another draw of tokens")
    runs = {"one": made_results.evaluation(tuple(saes)), "two": made_results.unit_norm(), "_run$_{$": other}
    runs = {place: dataclasses.replace(r, provenance=r.provenance | {"model": MODEL}) for place, r in runs.items()}
    found = depth_figures(runs)
    said = {name: words(figure) for name, figure in zip(found.figures, found.plot(), strict=True)}
    assert all("".join(MODEL.split()) in text for text in said.values())
    for name in (*NAMES[:3], "_run$_{$"):
        assert any(name in text for text in said.values()), name


def test_mathtext_is_off_for_names_only():
    """Log axes keep their powers of ten; figures drawn outside of `styled` keep mathtext."""
    with styled():
        figure, ax = plt.subplots()
        ax.plot([1, 1e6], [1, 1e9], label=legend_label("_x"))
        ax.set(xscale="log", yscale="log", title="$a_{$")
        ax.minorticks_off()
        legend = ax.legend()
    words(figure)
    assert ax.title.get_parse_math() or ax.get_title(loc="left") == "$a_{$"
    assert [text.get_text().strip("\u200b") for text in legend.get_texts()] == ["_x"]
    assert plt.figure().text(0, 0, "$x$").get_parse_math()
    assert legend_label("x_") == "x_" and legend_label("") != ""
