"""Edges against path patching by torch hooks, and on a model whose circuit is known."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.edges.result import EdgePatching
from diagnostics.edges.run import edge_patching
from diagnostics.edges.summary import share_of_sums
from diagnostics.edges.sweep import Sweep
from diagnostics.pairs.pair import Pair, Pairs
from interventions import Site
from interventions.errors import ResultError, SiteError
from tests import induction
from tests.paths import Paths
from tests.tiny import N_LAYERS, PARALLEL, TOLERANCE, VOCAB, tiny_model

NAMES = ("llama", "gpt2", "gpt_neox", "gemma2")
"""grouped queries; projections joined and LayerNorm; attention and MLP side by side; post-norms and windows"""
RECEIVERS = ((3, 1, "q"), (3, 1, "k"), (3, 0, "v"), Site(3, "mlp_out"), "logits")


def some_pairs(name: str, lengths=(9, 7)) -> Pairs:
    """Pairs that differ at the third token and a later one; the answers are those whose logit difference changes most."""
    hf, generator, found = tiny_model(name), torch.Generator().manual_seed(7), []
    for n in lengths:
        clean, other = torch.randint(1, VOCAB, (2, n), generator=generator).tolist()
        corrupt = [*clean[:2], other[2], *clean[3:5], other[5], *clean[6:]]
        change = torch.subtract(*(hf(input_ids=torch.tensor([t])).logits[0, -1] for t in (clean, corrupt)))
        found.append(Pair(tuple(clean), tuple(corrupt), int(change.argmax()), int(change.argmin())))
    return Pairs(tuple(found), np.zeros(len(found)), np.zeros(len(found)))


def difference(pair: Pair, logits: torch.Tensor) -> float:
    return float(logits[-1, pair.right] - logits[-1, pair.wrong])


def expected(name: str, pairs: Pairs, frame, mlps: str) -> np.ndarray:
    """m of each line, by full forward passes."""
    hf, found, paths = tiny_model(name), [], {}
    for line in frame.itertuples():
        pair = pairs[line.pair]
        runs = (pair.clean, pair.corrupt) if line.direction == "noise" else (pair.corrupt, pair.clean)
        here = paths.setdefault(runs, Paths(name, hf, list(runs[0]), list(runs[1])))
        sender = Site(0, "resid_pre") if line.sender == "embedding" else Site.parse(line.sender)
        receiver = Site(N_LAYERS - 1) if line.receiver == "logits" else Site.parse(line.receiver)
        at = {"all": None, "last": [len(pair) - 1]}.get(line.label, [line.position])
        found.append(difference(pair, here.logits(sender, receiver, at, mlps)))
    return np.array(found)


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_edge_is_that_of_full_forward_passes(name, mlps):
    pairs = some_pairs(name)
    result: Any = edge_patching(tiny_model(name), pairs, receivers=RECEIVERS, mlps=mlps, path="replay")
    frame: Any = result.frame
    heads = 4 * 3, 3
    before = 1 + sum(heads)
    counts = frame.groupby(["pair", "direction", "receiver"]).size().unstack()
    own_heads = 0 if name in PARALLEL else 4
    assert (counts["3.q.1"] == before).all() and (counts["3.mlp_out"] == before + own_heads).all()
    assert (counts["logits"] == 1 + 5 * N_LAYERS).all()
    turn = np.arange(len(frame)) % (1 if name == "llama" else 3) == 0
    some: Any = frame[turn & ((frame["pair"] == 0) == (frame["direction"] == "noise"))]
    assert np.abs(some["m"].to_numpy() - expected(name, pairs, some, mlps)).max() < TOLERANCE
    assert np.ptp(some["effect"]) > 0.05 and some["run"].mean() > 0.9
    assert result.provenance["path"] == {"pairs": "replay"}


def test_single_positions_are_those_of_full_forward_passes_and_earlier_ones_exact_zeros():
    pairs = some_pairs("llama")
    options = {"senders": ("embedding", (0, 1), (1, "mlp_out")), "receivers": ("2.q.3", "2.k.0", "2.mlp_out", "logits")}
    frame: Any = edge_patching(tiny_model("llama"), pairs, positions="each", directions=("noise",), **options).frame
    assert np.abs(frame["m"].to_numpy() - expected("llama", pairs, frame, "frozen")).max() < TOLERANCE
    differs = [pairs[p].differing for p in frame["pair"]]
    early = np.array([at < d[0] if at >= 0 else False for at, d in zip(frame["position"], differs, strict=True)])
    inner = np.array(
        [
            s == "embedding" and p >= 0 and p not in d
            for s, p, d in zip(frame["sender"], frame["position"], differs, strict=True)
        ]
    )
    assert early.any() and not frame["run"][early | inner].any() and (frame["effect"][early | inner] == 0).all()
    per = frame.groupby(["pair", "sender", "receiver"]).size().unstack()
    assert (per["2.q.3"].to_numpy().reshape(2, -1) == [[9], [7]]).all() and (per["logits"] == 1).all()
    last: Any = edge_patching(
        tiny_model("llama"), pairs, positions={"q": "last"}, directions=("noise",), **options
    ).frame
    keys = ["pair", "sender", "receiver"]
    ends = frame[frame["position"] == frame["pair"].map({0: 8, 1: 6})].set_index(keys)["m"]
    query = last[last["receiver"] == "2.q.3"].set_index(keys)
    assert (query["label"] == "last").all()
    assert np.abs(query["m"] - ends[query.index]).max() < TOLERANCE
    assert set(last[last["receiver"] == "2.k.0"]["label"]) == {"all"}


def planted() -> tuple[Pairs, list[induction.Pair]]:
    given = induction.pairs(n=1)
    made = [Pair(tuple(p.clean), tuple(p.corrupt), p.right, p.wrong) for p in given]
    return Pairs(tuple(made), np.zeros(len(made)), np.zeros(len(made))), given


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
def test_planted_circuit_has_its_edges_and_no_others(mlps):
    pairs, given = planted()
    frame: Any = edge_patching(
        induction.induction_model(), pairs, senders=("embedding", "z"), receivers=("q", "k", "v", "logits"), mlps=mlps
    ).frame
    assert len(frame) == 2 * len(given) * len(induction.Slow(induction.induction_model(), given[0]).edges())
    kind = np.array([given[i].kind for i in frame["pair"]])
    ends = {"embedding": "embedding", "logits": "logits"} | {f"{a}.z.{h}": (a, h) for a, h in induction.HEADS}
    for line, k in zip(frame.itertuples(), kind, strict=True):
        through = "" if line.through == "logits" else line.through
        receiver = "logits" if line.through == "logits" else (line.receiver_layer, line.receiver_head)
        there = {edge[:3] for edge in induction.EDGES[k]}
        truth = (ends[line.sender], receiver, through) in there
        assert line.effect / line.total == pytest.approx(float(truth), abs=induction.INERT), line


def test_summary_is_a_ratio_of_sums_with_the_jackknife_over_pairs(tmp_path):
    pairs = some_pairs("gpt2", (9, 7, 8, 9, 10, 7, 9, 8, 7, 9, 8, 10))
    result: Any = edge_patching(
        tiny_model("gpt2"), pairs, senders=("embedding", "z"), receivers=[(1, 2, "v"), "logits"]
    )
    line = next(g for g in result.groups if (g["sender"], g["receiver"], g["direction"]) == ("0.z.1", "1.v.2", "noise"))
    some: Any = result.frame.query("sender == '0.z.1' and receiver == '1.v.2' and direction == 'noise'")
    a, b = some["effect"].to_numpy(float), some["total"].to_numpy(float)
    without = (a.sum() - a) / (b.sum() - b)
    se = np.sqrt(((without - without.mean()) ** 2).sum() * 11 / 12)
    assert line["pairs"] == 12 and line["share"] == pytest.approx(a.sum() / b.sum())
    alone = share_of_sums(a, b)
    half = 2.200985 * se  # t, 11 degrees of freedom
    for low, high in ((line["share_low"], line["share_high"]), (alone.low, alone.high)):
        assert (high - low) / 2 == pytest.approx(half, rel=1e-5) and (high + low) / 2 == pytest.approx(
            line["share"], rel=1e-5
        )
    edges = result.edges[result.edges["direction"] == "denoise"]
    assert edges["share"].abs().is_monotonic_decreasing and (edges["q"].between(0, 1) | (edges["share"] == 0)).all()
    assert (edges["q"] <= 0.05).sum() <= ((edges["share_low"] > 0) | (edges["share_high"] < 0)).sum()
    result.write(tmp_path)
    pd.testing.assert_frame_equal(EdgePatching.load(tmp_path).edges, result.edges)
    texts = {text.get_text() for text in result.plot_graph(n=60).axes[0].texts}
    assert {
        "embedding",
        "0.1",
        "1.kv2",
        "v",
        "logits",
    } <= texts and "1.2" in texts  # head 2 of block 1 sends, its value receives
    assert {"edge_patching_denoise", "edge_patching_graph_noise"} <= set(result.figures())
    assert "strongest of" in result.table()


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"receivers": "12.q.1"}, SiteError, "no block 12"),
        ({"receivers": (2, 7, "q")}, SiteError, "no head 7"),
        ({"receivers": "resid_mid"}, SiteError, "no site 'resid_mid'"),
        ({"receivers": Site(2, "z", head=1)}, ResultError, "expected one of q, k, v"),
        ({"receivers": (2, 1)}, ResultError, "expected one of q, k, v"),
        ({"receivers": (0, 1, "q"), "senders": (1, 1)}, ResultError, "no sender stands before"),
        ({"receivers": "q", "positions": "first"}, ResultError, "known: all, last, each"),
        ({"receivers": "q", "positions": {"z": "all"}}, ResultError, "positions of a receiver"),
        ({"receivers": "q", "mlps": "thawed"}, ResultError, "known: frozen, recomputed"),
        ({"receivers": "q", "directions": ("sideways",)}, ResultError, "known: denoise, noise"),
        ({"receivers": []}, ResultError, "nothing named"),
    ],
)
def test_invalid_arguments_raise(settings, error, said):
    with pytest.raises(error, match=said):
        edge_patching(tiny_model("llama"), some_pairs("llama"), **settings)


def test_a_model_that_treats_tokens_otherwise_alone_is_refused(monkeypatch):
    alone = Sweep._alone
    monkeypatch.setattr(Sweep, "_alone", lambda *args: {p: 1.01 * x for p, x in alone(*args).items()})
    with pytest.raises(SiteError, match="q of block 2, computed token by token, is off by"):
        edge_patching(tiny_model("llama"), some_pairs("llama"), receivers=(2, 1, "q"))


def test_single_heads_at_a_norm_that_spans_them_are_refused():
    with pytest.raises(SiteError, match="norm spans heads"):
        edge_patching(tiny_model("olmo2"), some_pairs("llama"), receivers=(2, 1, "q"))
