"""Causal dimensionality of a model that is linear above the site against numpy, its parts, spans and controls."""

import functools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.causal_dimension.result import CausalDimension
from diagnostics.causal_dimension.run import causal_dimensionality
from diagnostics.causal_dimension.work import DIMENSIONS
from diagnostics.results.caveats import caveats
from diagnostics.statistics.tables import lines_of, totals
from interventions import ResultError, Site, SiteError, record
from tests.diagnostics.drawn import panels, series
from tests.planted import SITE, planted_model
from tests.tiny import D_MODEL, N_LAYERS, VOCAB, prompts, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:an interval from")
PROMPTS = prompts(tuple(4 + i % 3 for i in range(14)))
ALL = 1000
"""more tokens than there are: every usable one is used"""


@functools.cache
def planted() -> tuple:
    return planted_model()


@functools.cache
def found(**settings) -> CausalDimension:
    """Shared by tests, which leave it as it is."""
    hf, sae = planted()
    given = {
        "sites": (SITE,),
        "tokens": ALL,
        "saes": {"3/standard": sae},
        "spans": (1, 4, 12, D_MODEL),
        "sink_filter": None,
    }
    return causal_dimensionality(hf, PROMPTS, **{**given, **settings})


def rank(matrix: np.ndarray) -> float:
    q = np.linalg.svd(matrix, compute_uv=False)
    q = q[q > 1e-12 * q[0]] / q.sum()
    return float(np.exp(-(q * np.log(q)).sum()))


def by_hand() -> dict[str, np.ndarray]:
    """Σ JᵀMJ of each prompt's tokens but the first, `[prompt, d, d]`: logits are linear in the stream, J is the unembedding."""
    hf = planted()[0]
    w = hf.lm_head.weight.double().numpy()
    sums: dict[str, list] = {"fisher": [], "logits": []}
    for tokens in PROMPTS:
        with torch.no_grad():
            p = hf(input_ids=torch.tensor([tokens])).logits[0].softmax(-1).double().numpy()[1:]
        sums["fisher"].append(sum(w.T @ (np.diag(q) - np.outer(q, q)) @ w for q in p))
        sums["logits"].append(len(p) * w.T @ (np.eye(VOCAB) - 1 / VOCAB) @ w)
    return {name: np.stack(some) for name, some in sums.items()}


def test_effective_rank_of_linear_model_matches_singular_values():
    result = found()
    for metric, sums in by_hand().items():
        [g] = result.select(matrix=metric)
        assert g["tokens"] == sum(len(p) - 1 for p in PROMPTS)
        assert g["effective_rank"].value == pytest.approx(rank(sums.sum(0)), rel=1e-5)
        assert g["trace"] == pytest.approx(np.trace(sums.sum(0)) / g["tokens"], rel=1e-5)
        without = lines_of(result.frame, matrix=metric, part="without")
        expected = [rank(sums.sum(0) - sums[i]) for i in without["which"]]
        assert len(without) == len(PROMPTS) and without["effective_rank"].to_numpy() == pytest.approx(
            expected, rel=1e-5
        )
    j = planted()[0].lm_head.weight.double()
    [g] = result.select(
        matrix="logits"
    )  # every token has the same matrix: neither error nor growth, and κ² is of J alone
    centred = torch.linalg.svdvals(j - j.mean(0)).square().numpy()
    assert g["effective_rank"].value == pytest.approx(rank(np.diag(centred)), rel=1e-5)
    assert g["at 1/8"] == pytest.approx(g["effective_rank"].value, rel=1e-5) and g["effective_rank"].se < 1e-5
    assert g["effective_tokens"] == pytest.approx(g["tokens"], rel=1e-5)


def test_parts_are_disjoint_and_sum_to_the_whole():
    frame = lines_of(found().frame, matrix="fisher")
    n = int(lines_of(frame, part="all")["tokens"].iloc[0])
    for part, pieces in (("1/2", 2), ("1/4", 4), ("1/8", 8)):
        some = lines_of(frame, part=part)
        assert len(some) == pieces and some["tokens"].sum() == n
        whole = (some["tokens"] * some["trace"]).sum() / n
        assert whole == pytest.approx(float(lines_of(frame, part="all")["trace"].iloc[0]), rel=1e-5)


def test_results_do_not_depend_on_prompt_order():
    """The same prompts in reverse order."""
    result, hf = found(), planted()[0]
    other = causal_dimensionality(hf, PROMPTS[::-1], sites=(SITE,), tokens=ALL, sink_filter=None)
    for metric in ("fisher", "logits"):
        one, two = result.select(matrix=metric)[0], other.select(matrix=metric)[0]
        for name in ("effective_rank", "participation", "n50", "n90"):
            assert (one[name].value, one[name].se) == pytest.approx((two[name].value, two[name].se), rel=1e-4, abs=1e-6)


def test_random_rotations_keep_the_trace_and_raise_the_rank():
    frame = lines_of(found().frame, part="all")
    for metric in ("fisher", "logits"):
        own, turned = (lines_of(frame, matrix=name).iloc[0] for name in (metric, f"{metric}_rotated"))
        assert turned["trace"] == pytest.approx(own["trace"], rel=1e-5)
        assert own["effective_rank"] < turned["effective_rank"] <= D_MODEL
    assert turned["effective_rank"] > 0.8 * D_MODEL  # logits: some fifty equal matrices, each turned


def test_activations_have_the_effective_rank_of_their_covariance():
    hf = planted()[0]
    x = record(hf, PROMPTS, [SITE]).activations[SITE]
    x = torch.cat([x[i, 1 : len(p)] for i, p in enumerate(PROMPTS)]).double().numpy()
    [line] = lines_of(found().frame, matrix="activations").to_dict("records")
    assert line["tokens"] == len(x) and line["effective_rank"] == pytest.approx(rank(np.cov(x.T)), rel=1e-5)


def test_shares_of_the_trace_in_spans():
    result, (hf, sae) = found(), planted()
    x = record(hf, PROMPTS, [SITE]).activations[SITE]
    x = torch.cat([x[i, 1 : len(p)] for i, p in enumerate(PROMPTS)])
    size = sae.encode(x).abs().sum(0) * sae.W_dec.norm(dim=1)
    order = size.argsort(descending=True)
    share = {(g["matrix"], g["rows"], g["k"]): g["share"].value for g in result.span_groups}
    for metric, sums in by_hand().items():
        whole = sums.sum(0)
        for k in (1, 4, 12):
            q = np.linalg.qr(sae.W_dec[order[:k]].T.numpy())[0]
            assert share[metric, "most_active", k] == pytest.approx(
                np.trace(q.T @ whole @ q) / np.trace(whole), rel=1e-5
            )
            top = np.linalg.eigvalsh(whole)[::-1][:k].sum() / np.trace(whole)
            assert share[metric, "eigenvectors", k] == pytest.approx(top, rel=1e-5)
            assert max(share[metric, rows, k] for rows in ("most_active", "random", "principal")) <= top
        assert share[metric, "principal", D_MODEL] == pytest.approx(1, rel=1e-6)
        assert (metric, "random", D_MODEL) not in share  # no more rows than latents


def test_sketches_of_the_run():
    """Sketches of all directions equal the full result; smaller ones approximate the trace, and a caveat names their limit."""
    whole, some = (found(directions=k, saes=None, spans=None) for k in (D_MODEL, 28))
    for metric in ("fisher", "logits"):
        one, two, three = (result.select(matrix=metric)[0] for result in (found(), whole, some))
        for name in ("effective_rank", "participation", "n80"):
            assert two[name].value == pytest.approx(one[name].value, rel=1e-4)
        assert three["trace"] == pytest.approx(one["trace"], rel=0.3) and np.isnan(three["rotated"])
    assert any("sketch of 28 of 32" in line for line in caveats(some))


@functools.cache
def usual() -> CausalDimension:
    sites = (Site(1), Site(4), Site(4, "mlp_out"))
    return causal_dimensionality(tiny_model("gpt2"), PROMPTS, sites=sites, tokens=20, null_seeds=1)


def test_all_sites_and_models_share_one_token_draw(tmp_path):
    result = usual()
    frame, p = result.frame, result.provenance
    assert tuple(frame) == DIMENSIONS and p["rows"] == len(frame)
    assert set(frame["model"]) == {"trained", "random 0"} and len(result.groups) == 2 * 3 * 2
    whole = lines_of(frame, part="all", matrix="fisher")
    assert whole["tokens"].nunique() == 1
    drawn = p["drawn"]["trained"]
    assert drawn["tokens_used"] == 20 - sum(drawn["pairs_dropped"].values()) == int(whole["tokens"].iloc[0])
    assert p["second_order"]["method"] == "forward" and p["second_order"]["agreement"] < 0.05
    keys = ["model", "layer", "point", "matrix"]
    sums = totals(result.spectrum, keys, ["eigenvalue"])["eigenvalue"]
    traces = totals(lines_of(frame, part="all"), keys, ["trace"])["trace"]
    np.testing.assert_allclose(sums.to_numpy(), traces.to_numpy(), rtol=1e-4)
    assert sums.index.equals(traces.index)
    result.write(tmp_path)
    loaded = CausalDimension.load(tmp_path)
    assert loaded.table() == result.table() and loaded.spans.empty
    assert set(result.figures()) == {"causal_dimension_resid_post", "causal_dimension_mlp_out"}
    for figure in result.figures().values():
        assert [len(series(ax)) for ax in panels(figure)] == [2, 3, 2]  # two metrics; 50, 80, 90 %; two metrics
    plt.close("all")
    said = [str(h) for h in result.headlines()]
    assert said and all("randomly initialised models" in line and "turned at random" in line for line in said)


def test_rerun_from_its_folder_gives_the_same_table(tmp_path):
    how = {"sites": (Site(4),), "tokens": 6, "folder": tmp_path}
    one, two = (causal_dimensionality(tiny_model("gpt2"), PROMPTS, **how) for _ in range(2))
    pd.testing.assert_frame_equal(one.frame, two.frame)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"sites": (Site(1, "z"),)}, ResultError, "lies inside a block"),
        ({"layers": (N_LAYERS,)}, SiteError, f"block {N_LAYERS}"),
        ({"tokens": 1}, ResultError, "ask for 2 or more"),
        ({"directions": D_MODEL + 1}, ResultError, "expected 2 to d_model = 32"),
        ({"spans": (0,)}, ResultError, "decoder rows from 1"),
        ({"saes": True, "directions": 8, "sites": (SITE,)}, ResultError, "need every direction"),
        ({"saes": True, "layers": (1,)}, ResultError, "3/standard is at 3.resid_post"),
    ],
)
def test_invalid_arguments_raise(how, error, said):
    hf, sae = planted()
    how = how | ({"saes": {"3/standard": sae}} if "saes" in how else {})
    with pytest.raises(error, match=said):
        causal_dimensionality(hf, PROMPTS, **how)
