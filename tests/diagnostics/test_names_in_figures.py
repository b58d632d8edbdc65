"""Names that users give are shown as they are: in every figure of every kind of result, and on its page."""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from diagnostics.concentration import causal_concentration
from diagnostics.contests import win_rate_report
from diagnostics.depth import depth_figures
from diagnostics.dictionary_comparison import compare_dictionaries
from diagnostics.dosing import dose_response
from diagnostics.effect_sparsity import ablation_sparsity
from diagnostics.latent_pairs import interactions
from diagnostics.saved import KINDS
from diagnostics.steering import latent_steering
from diagnostics.style import legend_label, styled
from diagnostics.substitution import atom_substitution
from tests.diagnostics import (
    made_results,
    test_ablation_plots,
    test_atlas,
    test_dictionary_comparison,
    test_direction_plots,
    test_projections,
    test_sae_plots,
    test_sparse_probing,
    test_specification,
    test_unit_norm,
)
from tests.planted import planted_model
from tests.tiny import D_MODEL, prompts, tiny_model

NAMES = ("_hidden$x_{$", 'b<i>&"$\\frac{$', "$$c^{%$_", "\\$d\u200f\u202e_{}^", "__", "$e$")
"""Of SAEs and directions: half a formula, markup, marks of writing from right to left, what matplotlib leaves out of legends."""
MODEL, TEXT = "m<b>$_{$ & _", "_t$\\sum_$<"
PROMPTS = prompts(tuple(8 + (3 * i) % 7 for i in range(26)))


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The same with other names, wherever they stand: keys, values, columns of tables, `name` within a longer `name|…`."""
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


RESULTS: dict[str, Callable[[], Any]] = {
    "direction_norm": test_direction_plots.result,
    "dose_response": doses,
    "unit_norm": test_unit_norm.result,
    "specification": test_specification.curve_of_two,
    "sae_evaluation": test_sae_plots.result,
    "projections": test_projections.found,
    "win_rate": lambda: win_rate_report({"one": poisoned(test_projections.found())[0]}),
    "atlas": test_atlas.found,
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
}  # fmt: skip


def words(figure: Any) -> str:
    """Everything that is written in a figure, drawn, without white space."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert not any("mathdefault" in t.get_text() and not t.get_parse_math() for t in shown)  # powers of ten are set
    return "".join("".join(text.get_text() for text in shown).split())


def test_every_kind_is_here():
    assert set(RESULTS) == set(KINDS)


@pytest.mark.filterwarnings("ignore:an interval from")
@pytest.mark.parametrize("kind", RESULTS)
def test_names_are_shown_as_they_are(kind):
    result = RESULTS[kind]()
    given = list(NAMES[:3]) if kind == "dose_response" else []
    if kind != "win_rate":
        result, given = (found := poisoned(result))[0], given + found[1]
    figures = result.figures()
    said = [words(figure) for figure in figures.values()]
    assert said
    if kind not in ("specification", "win_rate"):
        assert all("".join(MODEL.split()) in text for text in said)
    for name in given:
        assert any(name in text for text in said), name
    page = result._repr_html_()
    assert "<i>" not in page and "m<b>" not in page
    assert isinstance(result.table(), str) and len(result.summary())


def test_figures_by_depth_show_names_as_they_are():
    """Of SAEs, models, texts, and of the folders that tell runs apart."""
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


def test_mathematics_is_off_for_names_alone():
    """Log axes keep their powers of ten, also those that are drawn later; whoever draws outside is left alone."""
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
