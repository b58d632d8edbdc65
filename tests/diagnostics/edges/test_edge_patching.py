"""Edges against path patching by torch hooks, and on a model whose circuit is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Annotation
from scipy import stats

from diagnostics.edges import work
from diagnostics.edges.result import EdgePatching
from diagnostics.edges.run import edge_patching
from diagnostics.edges.sweep import Sweep
from diagnostics.pairs.controls import NO_CONTROL, partners
from diagnostics.pairs.pair import Pair, Pairs, labels
from diagnostics.pairs.shares import share_of_sums
from diagnostics.statistics.tables import lines_of
from interventions import Site
from interventions.errors import ResultError, SiteError
from tests import induction, inside
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


def expected(name: str, pairs: Pairs, frame, mlps: str, later: str = "run") -> np.ndarray:
    """m of each line, by full forward passes."""
    hf, found, paths = tiny_model(name), [], {}
    for line in frame.itertuples():
        pair = pairs[line.pair]
        runs = (pair.clean, pair.corrupt) if line.direction == "noise" else (pair.corrupt, pair.clean)
        here = paths.setdefault(runs, Paths(name, hf, list(runs[0]), list(runs[1])))
        sender = Site(0, "resid_pre") if line.sender == "embedding" else Site.parse(line.sender)
        receiver = Site(N_LAYERS - 1) if line.receiver == "logits" else Site.parse(line.receiver)
        at = {"all": None, "last": [len(pair) - 1]}.get(line.label, [line.position])
        found.append(difference(pair, here.logits(sender, receiver, at, mlps, later)))
    return np.array(found)


@pytest.mark.parametrize(
    ("name", "mlps"),
    [*[(name, "frozen") for name in NAMES if name != "gpt2"], ("gpt2", "recomputed"), ("gemma2", "recomputed")],
)
def test_edges_match_full_forward_passes(name, mlps):
    pairs = some_pairs(name)
    result: Any = edge_patching(tiny_model(name), pairs, receivers=RECEIVERS, mlps=mlps, controls=0, path="replay")
    frame: Any = result.frame
    heads = 4 * 3, 3
    before = 1 + sum(heads)
    counts = frame.groupby(["pair", "direction", "receiver"]).size().unstack()
    own_heads = 0 if name in PARALLEL else 4
    assert (counts["3.q.1"] == before).all() and (counts["3.mlp_out"] == before + own_heads).all()
    assert (counts["logits"] == 1 + 5 * N_LAYERS).all()
    turn = np.arange(len(frame)) % (3 if name == "llama" else 7) == 0
    some: Any = frame[turn & ((frame["pair"] == 0) == (frame["direction"] == "noise"))]
    assert np.abs(some["m"].to_numpy() - expected(name, pairs, some, mlps)).max() < TOLERANCE
    assert np.ptp(some["effect"]) > 0.05 and some["run"].mean() > 0.9
    assert result.provenance["path"] == {"pairs": "replay"}


def test_single_position_edges_match_full_passes():
    pairs = some_pairs("llama")
    options = {"senders": ("embedding", (0, 1), (1, "mlp_out")), "receivers": ("2.q.3", "2.k.0", "2.mlp_out", "logits")}
    frame: Any = edge_patching(tiny_model("llama"), pairs, positions="each", directions=("noise",), **options).frame
    some = frame.iloc[::4]
    assert np.abs(some["m"].to_numpy() - expected("llama", pairs, some, "frozen")).max() < TOLERANCE
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


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
def test_direct_edges_match_full_passes_with_frozen_writes(name, monkeypatch):
    monkeypatch.setattr(work, "_HELD", 5000)  # rows in several parts
    pairs = some_pairs(name)
    senders = ("embedding", (0, 1), (1, 3), (2, "mlp_out"))
    frame: Any = edge_patching(
        tiny_model(name), pairs, receivers=RECEIVERS, senders=senders, later="frozen", controls=0, path="replay"
    ).frame
    some = frame.iloc[::3]
    direct = expected(name, pairs, some, "frozen", "frozen")
    assert np.abs(some["m"].to_numpy() - direct).max() < TOLERANCE and np.ptp(frame["effect"]) > 0.05
    run: Any = edge_patching(tiny_model(name), pairs, receivers=RECEIVERS, senders=senders, controls=0).frame
    logits = (frame["receiver"] == "logits").to_numpy()
    away = np.abs(frame["m"] - run["m"]).to_numpy()
    assert away[logits].max() < TOLERANCE and away[~logits].max() > 100 * TOLERANCE


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


def named(length: int, turn: int) -> tuple[str, ...]:
    """Roles of all positions, each pair's in another order: those of its two differing tokens stay."""
    rest = [f"t{(i + turn) % (length - 2)}" for i in range(length - 2)]
    return (*rest[:2], "A", *rest[2:4], "B", *rest[4:])


class Control(Paths):
    """Senders write as much as in the source run, along the difference of two other prompts at the same labels."""

    def __init__(self, name: str, hf, base: list[int], source: list[int], others: list[tuple[list[int], list[int]]]):
        super().__init__(name, hf, base, source)
        self.others = others
        """tokens of a prompt, and where each position's label stands there"""

    def write(self, sender: Site) -> torch.Tensor:
        own = super().write(sender)
        if sender.point == "z":
            one, other = (inside.clean(self.name, self.hf, x, sender.whole)[at] for x, at in self.others)
            z, here = (
                inside.clean(self.name, self.hf, self.base, sender.whole),
                slice(*(inside.D_HEAD * ((sender.head or 0) + i) for i in (0, 1))),
            )
            z[:, here] += (one - other)[:, here]
            seen: dict = {}
            out = Site(sender.layer, "attn_out")
            self._pass(self.base, {sender.whole: z}, seen, [out])
            along = seen[out] - self.here[out]
        else:
            one, other = (self._streams(x)[sender][at] for x, at in self.others)
            along = one - other
        return torch.where(
            own.norm(dim=-1, keepdim=True) > 0,
            own.norm(dim=-1, keepdim=True) * along / along.norm(dim=-1, keepdim=True),
            0,
        )


@pytest.mark.parametrize(("name", "mlps"), [("llama", "recomputed"), ("gpt2", "frozen"), ("gemma2", "frozen")])
def test_controls_match_full_forward_passes(name, mlps):
    plain, hf = some_pairs(name, (8, 8, 8, 8)), tiny_model(name)
    pairs = Pairs(tuple(replace(p, roles=named(8, i)) for i, p in enumerate(plain)), np.zeros(4), np.zeros(4))
    senders = ("embedding", (0, 1), (1, 3), (2, 0), (0, "mlp_out"), (2, "mlp_out"))
    frame: Any = edge_patching(
        hf, pairs, receivers=RECEIVERS, senders=senders, mlps=mlps, controls=2, path="replay"
    ).frame
    drawn = partners(pairs, 2, 0)
    own, controls = frame[frame["control"] == 0], frame[frame["control"] > 0]
    assert len(controls) == 2 * own["run"].sum() and controls["run"].all() and np.ptp(controls["effect"]) > 0.05
    for line in controls.iloc[:: 13 if name == "llama" else 23].itertuples():
        pair = pairs[line.pair]
        base, source = (pair.clean, pair.corrupt) if line.direction == "noise" else (pair.corrupt, pair.clean)
        two = [pairs[j] for j in drawn[line.pair, line.control - 1]]
        others = [(list(p.clean), [labels(p).index(label) for label in labels(pair)]) for p in two]
        here = Control(name, hf, list(base), list(source), others)
        sender = Site(0, "resid_pre") if line.sender == "embedding" else Site.parse(line.sender)
        receiver = Site(N_LAYERS - 1) if line.receiver == "logits" else Site.parse(line.receiver)
        logits = here.logits(sender, receiver, {"all": None, "last": [len(pair) - 1]}[line.label], mlps)
        assert abs(difference(pair, logits) - line.m) < TOLERANCE, line
        if line.receiver == "logits" and mlps == "frozen":
            dose = here.write(sender)[-1].norm() / here.here[receiver][-1].norm()
            assert line.dose == pytest.approx(float(dose), rel=1e-4)
    if mlps == "frozen":
        keys = ["pair", "direction", "sender", "receiver"]
        at = own[own["run"]].set_index(keys)["dose"]
        assert np.allclose(controls["dose"], at[pd.MultiIndex.from_frame(controls[keys])], rtol=1e-4)


def test_edges_without_two_other_pairs_have_no_control():
    model, pairs = tiny_model("llama"), some_pairs("llama")
    result: Any = edge_patching(model, pairs, receivers="logits", directions=("noise",), controls=3)
    assert (result.frame["control"] == 0).all()
    assert result.provenance["rows_dropped"] == {NO_CONTROL: 3 * int(result.frame["run"].sum())}
    without: Any = edge_patching(model, pairs, receivers="logits", directions=("noise",), controls=0)
    assert without.provenance["rows_dropped"] == {} and without.frame.equals(result.frame)


def poolable(kind: str, n: int) -> Pairs:
    """Planted pairs of one kind whose positions all have roles."""
    made = []
    for p in induction.pairs(n=n, lengths=(8,), kinds=(kind,)):
        at, others = {i: role for role, i in p.roles.items()}, iter("XYZUVW")
        roles = tuple(at.get(i) or next(others) for i in range(len(p.clean)))
        made.append(Pair(tuple(p.clean), tuple(p.corrupt), p.right, p.wrong, roles))
    return Pairs(tuple(made), np.zeros(n), np.zeros(n))


@pytest.mark.parametrize("kind", induction.KINDS)
def test_only_planted_edges_beat_their_controls(kind):
    pairs = poolable(kind, 14)
    edges: Any = edge_patching(
        induction.induction_model(), pairs, senders=("embedding", "z"), receivers=("q", "k", "v", "logits")
    ).edges
    ends = {"embedding": "embedding", "logits": "logits"} | {f"{a}.z.{h}": (a, h) for a, h in induction.HEADS}
    for direction in ("denoise", "noise"):
        some = edges[(edges["direction"] == direction) & edges["beats"] & (edges["share"].abs() > induction.INERT)]
        found = {
            (ends[g.sender], "logits", "")
            if g.through == "logits"
            else (ends[g.sender], (g.receiver_layer, g.receiver_head), g.through)
            for g in some.itertuples()
        }
        assert found == {edge[:3] for edge in induction.EDGES[kind]}
        assert (some["share"].to_numpy() > 0.8 + np.abs(some["control"].to_numpy())).all() and (
            some["null"] < 0.2
        ).all()


def test_edge_share_is_a_ratio_of_sums_with_jackknife(tmp_path):
    pairs = some_pairs("gpt2", (8,) * 14)
    result: Any = edge_patching(
        tiny_model("gpt2"), pairs, senders=("embedding", (0, 1), (2, 3)), receivers=[(1, 2, "v"), "logits"], controls=2
    )
    line = next(
        g for g in result.groups if (g["sender"], g["receiver"], g["direction"]) == ("embedding", "1.v.2", "noise")
    )
    some: Any = result.frame.query("sender == 'embedding' and receiver == '1.v.2' and direction == 'noise'")
    own = some[some["control"] == 0]
    a, b = own["effect"].to_numpy(float), own["total"].to_numpy(float)
    without = (a.sum() - a) / (b.sum() - b)
    se = np.sqrt(((without - without.mean()) ** 2).sum() * 13 / 14)
    effective = np.abs(a).sum() ** 2 / (a**2).sum()
    assert line["pairs"] == 14 and line["share"] == pytest.approx(a.sum() / b.sum())
    alone = share_of_sums(a, b)
    assert line["effective"] == pytest.approx(effective) and alone.n_effective == pytest.approx(effective)
    far = stats.t.ppf(0.975, effective - 1) * se if effective >= 10 else np.nan
    for low, high in ((line["share_low"], line["share_high"]), (alone.low, alone.high)):
        assert np.array([low, high]) == pytest.approx(line["share"] + far * np.array([-1, 1]), rel=1e-5, nan_ok=True)
    control = some[some["control"] > 0].groupby("pair")["effect"].mean().to_numpy(float)
    assert line["control"] == pytest.approx(control.sum() / b.sum())
    assert line["difference"] == pytest.approx((a - control).sum() / b.sum())
    assert line["p"] == pytest.approx(stats.ttest_rel(a, control).pvalue, rel=1e-6)
    for direction in ("denoise", "noise"):
        edges = result.edges[result.edges["direction"] == direction]
        assert edges["share"].abs().is_monotonic_decreasing
        known = edges["p"].dropna().to_numpy()
        assert edges["q"].dropna().to_numpy() == pytest.approx(stats.false_discovery_control(known))
        assert (edges["beats"] == ((edges["q"] <= 0.05) & (edges["share"].abs() > edges["control"].abs()))).all()
        single = result.frame.query("direction == @direction and control > 0").groupby(
            ["sender", "receiver", "control"]
        )
        sums = single[["effect", "total"]].sum()
        assert edges["null"].unique() == pytest.approx([(sums["effect"] / sums["total"]).abs().max()])
    result.write(tmp_path)
    pd.testing.assert_frame_equal(EdgePatching.load(tmp_path).edges, result.edges)
    assert {"edge_patching_denoise", "edge_patching_graph_noise"} <= set(result.figures())
    assert "largest |share| of a control" in result.table()


def with_large_effects(result: EdgePatching, edges) -> EdgePatching:
    """Some edges (sender, receiver) far above their controls."""
    frame: Any = result.frame.astype({"effect": float})
    own = pd.MultiIndex.from_frame(frame[["sender", "receiver"]]).isin(list(edges)) & (frame["control"].to_numpy() == 0)
    frame.loc[own, "effect"] = frame["total"][own] * (0.5 + 0.01 * frame["pair"][own])
    return EdgePatching(frame, result.tokens, result.provenance)


def test_edges_not_beating_controls_are_dimmed_or_left_out():
    pairs = some_pairs("gpt2", (8,) * 12)
    options = {"senders": ("embedding", "z"), "receivers": [(1, 2, "v"), "logits"], "directions": ("noise",)}
    result: Any = edge_patching(tiny_model("gpt2"), pairs, **options)
    chosen = result.edges[result.edges["run"] > 0].head(3)[["sender", "receiver"]]
    planted = with_large_effects(result, chosen.itertuples(index=False, name=None))
    frame = planted.frame
    beat = planted.edges[planted.edges["beats"]]
    assert len(beat) >= 3
    figure = planted.plot()
    alpha = figure.axes[0].images[-1].get_array()[..., 3]
    assert (alpha == 1).sum() == len(beat) and ((alpha > 0) & (alpha < 1)).sum() == (~planted.edges["beats"]).sum()
    marks = {abs(float(line.get_ydata()[0])) for line in figure.axes[-1].lines if len(set(line.get_ydata())) == 1}
    assert any(mark == pytest.approx(planted.edges["null"].iloc[0]) for mark in marks)
    arrows = [text for text in planted.plot_graph(n=60).axes[0].texts if isinstance(text, Annotation)]
    assert len(arrows) == len(beat) and "that beat their controls" in planted.plot_graph().get_supxlabel().replace(
        "\n", " "
    )
    every = EdgePatching(lines_of(frame, control=0), result.tokens, result.provenance)
    graph = every.plot_graph(n=60)
    texts = {text.get_text() for text in graph.axes[0].texts}
    assert {"embedding", "0.1", "1.kv2", "v", "logits", "1.2"} <= texts  # head 2 of block 1 sends, its value receives
    assert "not tested" in graph.get_supxlabel() and "not tested" in every.table()


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
        ({"receivers": "q", "later": "thawed"}, ResultError, "known: run, frozen"),
        ({"receivers": "q", "controls": -1}, ResultError, "-1 controls"),
    ],
)
def test_invalid_arguments_raise(settings, error, said):
    with pytest.raises(error, match=said):
        edge_patching(tiny_model("llama"), some_pairs("llama"), **settings)


def test_failed_token_by_token_check_raises(monkeypatch):
    alone = Sweep._alone
    monkeypatch.setattr(Sweep, "_alone", lambda *args: {p: 1.01 * x for p, x in alone(*args).items()})
    with pytest.raises(SiteError, match="q of block 2, computed token by token, is off by"):
        edge_patching(tiny_model("llama"), some_pairs("llama"), receivers=(2, 1, "q"))


def test_single_heads_under_a_norm_across_heads_raise():
    with pytest.raises(SiteError, match="norm spans heads"):
        edge_patching(tiny_model("olmo2"), some_pairs("llama"), receivers=(2, 1, "q"))
